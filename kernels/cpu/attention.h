/* The CPU kernels of one transformer stage: C interface. One thread, no allocation kept, no global state
 * but the choice of instruction set.
 *
 * Values are float (is_bf16 = 0) or bfloat16 as uint16_t (is_bf16 = 1); sums are always float. No result
 * depends on how many rows a call has: row i of the output has the same bits in any call. */
#ifndef KF_ATTENTION_H
#define KF_ATTENTION_H
#include <stdint.h>

enum { KF_OK = 0, KF_NO_MEMORY = -1, KF_BAD_BLOCK = -2, KF_BAD_CONTEXT = -3, KF_BAD_POSITION = -4 };

/* The KV cache of a stage. A block is one contiguous range: [layer][K, V][kv head][...], where K is
 * [head_dim][block_size] (sixteen keys are one vector) and V is [block_size][head_dim]. */
typedef struct {
    void *base;
    int64_t num_blocks, layers, kv_heads, block_size, head_dim;
    int is_bf16;
} kf_cache;

/* One step: row i of B has queries cu_q[i] .. cu_q[i+1]-1, which are the last of its context_lens[i] keys. */
typedef struct {
    const int64_t *positions, *slots;   /* [T] */
    const int32_t *cu_q;                /* [B + 1] */
    const int32_t *context_lens;        /* [B] */
    const int32_t *tables;              /* [B, width] */
    int64_t tokens, rows, width;
} kf_step;

/* out[T, heads, head_dim] = softmax(scale q K) V, causal; window > 0 keeps only the last `window` keys. */
int kf_attention(const kf_cache *kv, int64_t layer, const kf_step *step, const void *q, void *out,
                 int64_t heads, float scale, int64_t window);

/* Splits qkv[T, (heads + 2 kv_heads) head_dim] (rows `stride` elements apart), applies the optional norms
 * and the rotation (cos, sin: [table_rows, head_dim / 2]), writes q[T, heads, head_dim] and K, V into the cache. */
int kf_rope_write(const kf_cache *kv, int64_t layer, const kf_step *step, const void *qkv, int64_t stride,
                  const float *cos, const float *sin, int64_t table_rows, const void *q_norm, const void *k_norm,
                  float eps, int64_t heads, void *q);

/* residual += x (if x), out = weight * rms_normalised(residual) (if out). All [rows, n]. */
void kf_add_rms_norm(const void *x, void *residual, const void *weight, void *out, int64_t rows, int64_t n,
                     float eps, int is_bf16);

/* out[rows, n] = silu(x[:, :n]) * x[:, n:2n] */
void kf_silu_mul(const void *x, void *out, int64_t rows, int64_t n, int is_bf16);

/* out[rows, n] = x[rows, k] W^T + bias (if any), W packed as [ceil(n / 16)][k][16] with zeros beyond n. */
int kf_linear(const void *x, const void *w, const void *bias, void *out, int64_t rows, int64_t k, int64_t n,
              int is_bf16);

/* 0 plain C, 1 AVX2, 2 AVX-512; at most what the processor has. Returns what is in use. */
int kf_set_isa(int isa);
#endif
