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
#define KF_ROW_BLOCK 96 /* rows of a long step that one thread computes of a panel */

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

int64_t kf_prepared_size(int64_t k, int is_bf16) { return kf_prepared_bytes(k, is_bf16); }

int64_t kf_panel_size(kf_format format, int64_t k, int64_t span) { return kf_panel_bytes(format, kf_groups(k), span); }

/* AVX-512 without VNNI has no instruction for bytes: AVX2 serves there. */
const kf_q_ops *kf_q_ops_for(int is_bf16)
{
#ifdef KF_X86
    const int isa = kf_isa();
    __builtin_cpu_init();
    if (isa >= 2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return is_bf16 ? &q_ops_bf16_avx512 : &q_ops_f32_avx512;
    if (isa >= 1 && __builtin_cpu_supports("f16c"))
        return is_bf16 ? &q_ops_bf16_avx2 : &q_ops_f32_avx2;
#endif
    return is_bf16 ? &q_ops_bf16_plain : &q_ops_f32_plain;
}
