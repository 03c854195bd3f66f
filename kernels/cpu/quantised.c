/* The kernels of quantised weights, compiled for every instruction set, as dispatch.c does with the others. */
#include <math.h>
#include <string.h>

#include "ops.h"
#include "qformats.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KF_X86 1
#include <immintrin.h>
#endif

#define KF_PRAGMA(x) _Pragma(#x)
#define KF_FEW_ROWS 8   /* float rows for which it does not pay to write a panel's values down */

#include "vec_plain.h"
#include "qvec_plain.h"
#include "qtyped.h"
#ifdef KF_X86
#include "vec_avx2.h"
#include "qvec_avx2.h"
#include "qtyped.h"
#define KF_DOT_BF16 0
#include "vec_avx512.h"
#include "qvec_avx512.h"
#include "qtyped.h"
#endif

int64_t kf_prepared_size(int64_t k) { return kf_prepared_bytes(k); }

int64_t kf_panel_size(kf_format format, int64_t k, int64_t span) { return kf_panel_bytes(format, kf_groups(k), span); }

/* AVX-512 without VNNI has no instruction for bytes: AVX2 serves there. */
static const kf_q_ops *best_ops(void)
{
#ifdef KF_X86
    const int isa = kf_isa();
    __builtin_cpu_init();
    if (isa >= 2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return &q_ops_avx512;
    if (isa >= 1 && __builtin_cpu_supports("f16c"))
        return &q_ops_avx2;
#endif
    return &q_ops_plain;
}

/* Each panel as floats, in the scratch space of the thread. */
static void linear_f32(kf_worker *worker, const kf_linear_args *a)
{
    const kf_ops *ops = kf_ops_for(0);
    const kf_q_ops *q_ops = best_ops();
    kf_linear_args dense = *a;
    dense.w.w = worker->scratch;
    dense.w.format = KF_DENSE;
    const int64_t columns = kf_is_gated(a->epilogue) ? (a->n + 31) / 32 * KF_PANEL : a->n;
    const int64_t panels = (columns + KF_PANEL - 1) / KF_PANEL;
    const int64_t blocks = a->rows > 2 * KF_ROW_BLOCK ? (a->rows + KF_ROW_BLOCK - 1) / KF_ROW_BLOCK : 1;
    const int64_t total = panels * blocks, grain = 1 + total / (16 * kf_team_threads(worker->team));
    for (int64_t unit, end; kf_next(worker, total, grain, &unit, &end);) {
        int64_t made = -1;
        for (; unit < end; unit++) {
            const int64_t panel = unit / blocks, block = unit % blocks;
            kf_beat(worker);
            if (a->rows <= KF_FEW_ROWS) {
                q_ops->rows(a, panel);
                continue;
            }
            if (panel != made)
                q_ops->floats(&a->w, a->k, panel, worker->scratch);
            made = dense.first_panel = panel;
            ops->linear_panel(&dense, block * a->rows / blocks, (block + 1) * a->rows / blocks, panel, 0);
        }
    }
}

void kf_q_prepare(kf_worker *worker, const kf_linear_args *a) { best_ops()->prepare(worker, a); }

void kf_panel(kf_worker *worker, const kf_linear_args *a, int64_t begin, int64_t end, int64_t panel, int is_bf16)
{
    if (a->w.format == KF_DENSE)
        kf_ops_for(is_bf16)->linear_panel(a, begin, end, panel, 0);
    else if (is_bf16)
        best_ops()->panel(a, begin, end, panel, 0);
    else if (a->rows <= KF_FEW_ROWS)
        best_ops()->rows(a, panel);
    else {
        kf_linear_args dense = *a;
        dense.w.w = worker->scratch;
        dense.w.format = KF_DENSE;
        dense.first_panel = panel;
        best_ops()->floats(&a->w, a->k, panel, worker->scratch);
        kf_ops_for(0)->linear_panel(&dense, begin, end, panel, 0);
    }
}

int64_t kf_q_scratch(int64_t k) { return k * KF_PANEL * (int64_t)sizeof(float); }

void kf_q_linear(kf_worker *worker, const kf_linear_args *a, int is_bf16)
{
    if (!is_bf16) {
        linear_f32(worker, a);
        return;
    }
    const kf_q_ops *ops = best_ops();
    ops->prepare(worker, a);
    kf_barrier(worker);
    ops->linear(worker, a);
}
