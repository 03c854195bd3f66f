/* The CPU kernels of one transformer stage: C interface.
 *
 * Values are float (is_bf16 = 0) or bfloat16 as uint16_t (is_bf16 = 1); sums are always float. No result depends on how
 * many rows a call has, how many threads share it or which instruction set runs: row i of the output has the same
 * bits in any call. */
#ifndef KF_KERNELS_H
#define KF_KERNELS_H
#include <stddef.h>
#include <stdint.h>

#include "team.h"

enum {
    KF_OK = 0, KF_NO_MEMORY = -1, KF_BAD_BLOCK = -2, KF_BAD_CONTEXT = -3, KF_BAD_POSITION = -4, KF_BAD_TOKEN = -5,
    KF_BAD_ROW = -6
};

#define KF_PANEL 64         /* outputs in one panel of a packed weight */
#define KF_EXPERTS_MAX 1024 /* of one layer; a multiple of 16 */

/* The KV cache of a stage. A block is one contiguous range: [layer][K, V][kv head][...], where V is
 * [block_size][head_dim], and K is [head_dim][block_size] in float (sixteen keys are one vector) and
 * [head_dim / 2][block_size][2] in bfloat16 (two products of sixteen keys are one instruction).
 *
 * planes: not NULL where this is not the whole stage's: planes[layer][kv head] is where K of a head is in block 0, in
 * units of plane_size values. to_values, to_block: from K of a head to its V, and from a block to the next; in values. */
typedef struct {
    void *base;
    int64_t num_blocks, layers, kv_heads, block_size, head_dim;
    int is_bf16;
    const int32_t *planes;
    int64_t plane_size, to_values, to_block;
} kf_cache;

/* From base to K of a head in block 0, in values. */
static inline int64_t kf_head_at(const kf_cache *kv, int64_t layer, int64_t head)
{
    return kv->planes ? kv->planes[layer * kv->kv_heads + head] * kv->plane_size
                      : (layer * 2 * kv->kv_heads + head) * kv->block_size * kv->head_dim;
}

/* One step: row i of B has queries cu_q[i] .. cu_q[i+1]-1, which are the last of its context_lens[i] keys. */
typedef struct {
    const int64_t *positions, *slots;   /* [T] */
    const int32_t *cu_q;                /* [B + 1] */
    const int32_t *context_lens;        /* [B] */
    const int32_t *tables;              /* [B, width] */
    int64_t tokens, rows, width;
} kf_step;

/* out = softmax(scale q K) V, causal; window > 0 keeps only the last `window` keys. q, out: [T, heads, head_dim]. */
typedef struct {
    const kf_cache *kv;
    const kf_step *step;
    int64_t layer, heads, window;
    float scale;
    const void *q;
    void *out;
} kf_attention_args;

/* Splits qkv[T, (heads + 2 kv_heads) head_dim] (rows `stride` elements apart), applies the optional norms and the
 * rotation of the first `rotated` values (cos, sin: [positions, rotated / 2]), writes q[T, heads, head_dim], and K and V into the cache. */
typedef struct {
    const kf_cache *kv;
    const kf_step *step;
    int64_t layer, heads, stride, rotated;
    const float *cos, *sin;
    const float *q_norm, *k_norm;
    float eps;
    int wide; /* as in kf_norm_args */
    const void *qkv;
    void *q;
} kf_rope_args;

/* out[rows, n] = weight * rms_normalised(x[rows, n]). `wide`: what is normalised is not rounded before it is weighted.
 * `add`: out += the rounded product. */
typedef struct {
    const void *x;
    const float *weight;
    void *out;
    int64_t rows, n;
    float eps;
    int wide, add;
} kf_norm_args;

typedef enum {
    KF_STORE,    /* out[rows, n] = x W^T + bias */
    KF_ADD,      /* out[rows, n] += x W^T + bias, the sum rounded before it is added */
    KF_SILU_MUL, /* out[rows, n] = silu(gate) * up; W holds gate and up by turns, 32 columns each; bias [2 n] */
    KF_FLOAT,    /* out[rows, n] = x W^T + bias, as floats */
    KF_GELU_MUL  /* as KF_SILU_MUL, with gelu in the form with tanh */
} kf_epilogue;

/* How a weight is kept: as values of the activations' type, or quantised (qformats.h). Q8_0 of GGUF is KF_INT8_F16, Q4_0
 * KF_INT4_F16, Q4_1 KF_INT4_F16_MIN, Q4_K KF_INT4_K. */
typedef enum {
    KF_DENSE,
    KF_INT8_ROW,     /* eight bits, a float scale for each output */
    KF_INT8_F16,     /* eight bits, a half scale for each group */
    KF_INT4_F16,     /* four bits less 8, a half scale for each group */
    KF_INT4_F16_MIN, /* four bits, half scale and min for each group */
    KF_INT4_F32_MIN, /* four bits, float scale and min for each `span` groups */
    KF_INT4_K        /* four bits, scale and min of six bits for each group, times two halves for each eight groups */
} kf_format;

/* Dense: packed as [panels][k][64] in float and [panels][k / 2][64][2] in bfloat16, zeros beyond n. */
typedef struct {
    const void *w, *bias;
    kf_format format;
    int64_t span;
} kf_weight;

/* A cut of a product's inputs into shards that depends on the model alone: ends[shards], ascending, the last one k, each a
 * multiple of the inputs that one multiply-add takes. */
typedef struct {
    const int64_t *ends; /* NULL: there is none */
    int64_t shards;
} kf_cut;

/* Totals over shards are whole numbers of 2^-32. A partial sum must be below `limit` in absolute value, else the output
 * becomes no number; limit times the number of shards, of all ranks, must not be above KF_FIXED_LIMIT. The total of one that
 * is beyond is KF_BEYOND, which stays recognisable whatever up to 126 other totals, beyond or not, add to it. */
#define KF_FIXED_ONE 4294967296.0    /* 2^32 */
#define KF_FIXED_LIMIT 8388608.0f    /* 2^23 */
#define KF_BEYOND ((int64_t)1 << 56) /* the limit is 2^55 in fixed point */

/* How a product is summed over shards. totals: where those of row i go instead of `out`: to row places[i] (NULL: i) of
 * [.., n], added to what is there or not. */
typedef struct {
    kf_cut cut;
    float limit;
    int64_t *totals;
    const int32_t *places;
    int add;
} kf_sum;

/* x[rows, k]. The product of a quantised weight with bfloat16 rows uses `prepared`, kf_prepared_size() bytes a row.
 * first_panel: the panel that w begins with. sum: of shards, of a dense weight with KF_STORE or KF_ADD; else NULL. */
typedef struct {
    const void *x;
    kf_weight w;
    void *out, *prepared;
    int64_t rows, k, n;
    kf_epilogue epilogue;
    int64_t first_panel;
    const kf_sum *sum;
} kf_linear_args;

/* A mixture of experts: a row takes the `chosen` ones whose logits, x router^T, are the largest, and adds up their
 * outputs with the softmax of the logits over all experts, or over the chosen ones (`normalised`), as weights.
 * gate_up, down: [experts]; router: dense. */
typedef struct {
    kf_weight router;
    const kf_weight *gate_up, *down;
    int64_t experts, chosen, intermediate;
    int normalised;
} kf_experts;

/* o_cut, down_cut: where these are sums over shards.
 * attention_out_norm, mlp_out_norm: of what attention and what the MLP add to the residual (NULL: none). table: which of
 * the stage's rotary tables. experts: NULL where there is one gate_up and one down. */
typedef struct {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm, *attention_out_norm, *mlp_out_norm;
    kf_weight qkv, o, gate_up, down;
    const kf_experts *experts;
    int64_t window, table;
    kf_cut o_cut, down_cut;
} kf_layer;

/* Where mixtures of experts keep a step's values: [rows, experts] and [rows, chosen]; first: [2 experts + 1];
 * gathered, activated, out: [rows * chosen, ...]; `prepared` of as many rows. Of the layer with the most of each. */
typedef struct {
    float *logits, *weights;
    int32_t *expert, *place, *first;
    void *gathered, *activated, *out, *prepared;
} kf_routes;

#define KF_TABLES 2 /* rotary tables of a stage */

/* The layers of a stage, and where a step's values go between its operations: all [>= rows, ...]. `embed`
 * [vocab, hidden] is there on the first stage; `norm` and `head`, packed [head_rows, hidden], on the last. */
typedef struct {
    const kf_layer *layers;
    int64_t num_layers, hidden, intermediate, heads, vocab;
    float eps, scale, embed_scale; /* embed_scale: what embeddings are multiplied by */
    float softcap;                 /* logits become softcap * tanh(logits / softcap); 0: they stay */
    kf_epilogue gated;             /* KF_SILU_MUL or KF_GELU_MUL */
    int norm_wide;
    const void *embed;
    const float *norm;
    kf_weight head; /* its w is NULL where there is none */
    int64_t head_rows;
    const float *cos[KF_TABLES], *sin[KF_TABLES]; /* [table_rows, rotated / 2] */
    int64_t table_rows, rotated;
    void *residual, *normed, *qkv, *q, *attended, *activated, *picked, *prepared;
    kf_routes routes;
} kf_stage;

/* Where a step's values come from, tokens [T] or activations [T, hidden], and where they go: activations [T, hidden]
 * or, on the last stage, logits [num_picked, vocab] of the rows `picked`. `nonfinite` is set if any of the activations is
 * not finite; of logits it is not. */
typedef struct {
    const int64_t *tokens;
    const void *hidden;
    const int32_t *picked;
    int64_t num_picked;
    void *out;
    int *nonfinite;
} kf_io;

/* Single operations, for tests and for what is not a layer. */
int kf_attention(kf_team *team, const kf_attention_args *a);
int kf_rope_write(kf_team *team, const kf_rope_args *a, int64_t table_rows);
void kf_rms_norm(kf_team *team, const kf_norm_args *a, int is_bf16);
int kf_linear(kf_team *team, const kf_linear_args *a, int is_bf16);
int64_t kf_prepared_size(int64_t k); /* bytes of a bfloat16 row of k inputs for quantised weights */
int64_t kf_panel_size(kf_format format, int64_t k, int64_t span); /* of a panel of such a weight */

/* A whole step: every thread walks through all its operations, with a barrier after each. */
int kf_stage_forward(kf_team *team, const kf_stage *stage, const kf_cache *kv, const kf_step *step, const kf_io *io);

/* 0 plain C, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16; at most what the processor has. Returns what is in use. */
int kf_set_isa(int isa);
int kf_isa(void);
#endif
