/* Entry points: check what the caller passed, then call the best instruction set the processor has.
 *
 * One build runs on any x86-64 (and, in plain C, anywhere): the same source is compiled for AVX-512, AVX2 and
 * plain C with function attributes. target_clones would do the same in one word, but cannot ask for AVX2 and FMA
 * together, and selecting by arch= compares processor names. All three give the same bits. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define KF_X86 1
#include <immintrin.h>
#endif

#define KF_HEAD_DIM_MAX 512
#define KF_ROW_BLOCK 64
#define START(pos, window) ((window) > 0 && (pos) + 1 > (window) ? (pos) + 1 - (window) : 0)

typedef struct {
    const int32_t *table;                        /* of the sequence */
    int64_t block_size, head_dim, block_stride;  /* block_stride in elements */
    int64_t base, end;                           /* keys [base, end); base is a multiple of 16 */
    int64_t pad, out_pad;                        /* floats between two rows of scores, of outputs */
} kf_tile;

/* The kernels of one element type on one instruction set; void pointers are to that element type. */
typedef struct {
    void (*attention)(const kf_cache *, int64_t layer, const kf_step *, const void *q, void *out, int64_t heads,
                      float scale, int64_t window, float *scratch);
    int (*rope_write)(const kf_cache *, int64_t layer, const kf_step *, const void *qkv, int64_t stride,
                      const float *cos, const float *sin, int64_t table_rows, const void *q_norm, const void *k_norm,
                      float eps, int64_t heads, void *q);
    void (*add_rms_norm)(const void *x, void *residual, const void *weight, void *out, int64_t rows, int64_t n,
                         float eps);
    void (*silu_mul)(const void *x, void *out, int64_t rows, int64_t n);
    void (*linear)(const void *x, const void *w, const void *bias, void *out, int64_t rows, int64_t k, int64_t n,
                   float *scratch);
} kf_ops;

static inline float kf_widen(uint16_t x)
{
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

#include "vec_plain.h"
#include "typed.h"
#ifdef KF_X86
#include "vec_avx2.h"
#include "typed.h"
#include "vec_avx512.h"
#include "typed.h"
#endif

static int isa_in_use = -1;

static int isa_best(void)
{
#ifdef KF_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx2 && __builtin_cpu_supports("avx512f") ? 2 : avx2 ? 1 : 0;
#else
    return 0;
#endif
}

int kf_set_isa(int isa)
{
    int best = isa_best();
    return isa_in_use = isa < 0 || isa > best ? best : isa;
}

static const kf_ops *ops(int is_bf16)
{
    switch (isa_in_use < 0 ? kf_set_isa(-1) : isa_in_use) {
#ifdef KF_X86
    case 2: return is_bf16 ? &ops_bf16_avx512 : &ops_f32_avx512;
    case 1: return is_bf16 ? &ops_bf16_avx2 : &ops_f32_avx2;
#endif
    default: return is_bf16 ? &ops_bf16_plain : &ops_f32_plain;
    }
}

static int check(const kf_cache *kv, int64_t layer, const kf_step *step)
{
    if (kv->head_dim > KF_HEAD_DIM_MAX || layer < 0 || layer >= kv->layers)
        return KF_BAD_CONTEXT;
    for (int64_t b = 0; b < step->rows; b++) {
        int64_t nq = step->cu_q[b + 1] - step->cu_q[b], ctx = step->context_lens[b];
        int64_t blocks = (ctx + kv->block_size - 1) / kv->block_size;
        if (step->cu_q[b] < 0 || nq < 0 || step->cu_q[b + 1] > step->tokens || ctx < nq || blocks > step->width)
            return KF_BAD_CONTEXT;
        for (int64_t i = 0; i < blocks; i++) {
            int32_t block = step->tables[b * step->width + i];
            if (block < 0 || block >= kv->num_blocks)
                return KF_BAD_BLOCK;
        }
    }
    return KF_OK;
}

int kf_attention(const kf_cache *kv, int64_t layer, const kf_step *step, const void *q, void *out,
                 int64_t heads, float scale, int64_t window)
{
    int64_t longest = 0;
    int bad = check(kv, layer, step);
    if (bad)
        return bad;
    for (int64_t b = 0; b < step->rows; b++)
        if (step->context_lens[b] > longest)
            longest = step->context_lens[b];
    /* eight rows of: query, output, scores (which begin up to 15 keys early and end up to 15 late) */
    size_t floats = 8 * (size_t)(kv->head_dim + (kv->head_dim + 15) + (longest + 32));
    float *scratch = aligned_alloc(64, (floats * sizeof *scratch + 63) / 64 * 64);
    if (!scratch)
        return KF_NO_MEMORY;
    ops(kv->is_bf16)->attention(kv, layer, step, q, out, heads, scale, window, scratch);
    free(scratch);
    return KF_OK;
}

int kf_rope_write(const kf_cache *kv, int64_t layer, const kf_step *step, const void *qkv, int64_t stride,
                  const float *cos, const float *sin, int64_t table_rows, const void *q_norm, const void *k_norm,
                  float eps, int64_t heads, void *q)
{
    if (kv->head_dim > KF_HEAD_DIM_MAX || layer < 0 || layer >= kv->layers)
        return KF_BAD_CONTEXT;
    return ops(kv->is_bf16)->rope_write(kv, layer, step, qkv, stride, cos, sin, table_rows, q_norm, k_norm, eps,
                                        heads, q);
}

void kf_add_rms_norm(const void *x, void *residual, const void *weight, void *out, int64_t rows, int64_t n,
                     float eps, int is_bf16)
{
    ops(is_bf16)->add_rms_norm(x, residual, weight, out, rows, n, eps);
}

void kf_silu_mul(const void *x, void *out, int64_t rows, int64_t n, int is_bf16)
{
    ops(is_bf16)->silu_mul(x, out, rows, n);
}

int kf_linear(const void *x, const void *w, const void *bias, void *out, int64_t rows, int64_t k, int64_t n,
              int is_bf16)
{
    float *scratch = NULL;
    if (is_bf16) {
        int64_t block = rows < KF_ROW_BLOCK ? rows : KF_ROW_BLOCK;
        scratch = aligned_alloc(64, ((size_t)(block * k) * sizeof *scratch + 63) / 64 * 64);
        if (!scratch)
            return KF_NO_MEMORY;
    }
    ops(is_bf16)->linear(x, w, bias, out, rows, k, n, scratch);
    free(scratch);
    return KF_OK;
}
