/* The kernels of one element type on one instruction set. Each is called by every thread of a team. */
#ifndef KF_OPS_H
#define KF_OPS_H
#include "kernels.h"

/* Of route(): logits [rows, experts]; weights, expert [rows, chosen]. */
typedef struct {
    const float *logits;
    float *weights;
    int32_t *expert;
    int64_t rows, experts, chosen;
    int normalised;
} kf_route_args;

/* Of combine(): out[rows, n] = or += the sum of weights[row, c] * x[place[row, c], n]. */
typedef struct {
    const void *x;
    const float *weights;
    const int32_t *place;
    void *out;
    int64_t rows, n, chosen;
    int add;
} kf_combine_args;

typedef struct {
    void (*attention)(kf_worker *, const kf_attention_args *);
    void (*rope_write)(kf_worker *, const kf_rope_args *);
    void (*rms_norm)(kf_worker *, const kf_norm_args *);
    void (*linear)(kf_worker *, const kf_linear_args *);
    /* Rows [begin, end) of one panel, by one thread; fetch_next: the next panel lies behind it, and comes next. */
    void (*linear_panel)(const kf_linear_args *, int64_t begin, int64_t end, int64_t panel, int fetch_next);
    void (*route)(kf_worker *, const kf_route_args *);
    void (*combine)(kf_worker *, const kf_combine_args *);
    /* x[n] *= scale, by one thread. */
    void (*scale)(void *x, int64_t n, float scale);
    /* logits = softcap * tanh(logits / softcap) */
    void (*softcap)(kf_worker *, float *logits, int64_t n, float softcap);
    /* What becomes of the totals [rows, n] of sums over shards; of the arguments: bias, out, rows, n and epilogue. */
    void (*fixed_finish)(kf_worker *, const kf_linear_args *, const int64_t *totals);
} kf_ops;

/* Of quantised weights. For bfloat16 rows linear() takes what prepare(), by all threads, has made of them before; floats()
 * writes the values of a panel, [k][64], of which linear_panel() makes the product with float rows, and rows() makes that
 * of a few float rows at once, with the same bits. */
typedef struct {
    void (*prepare)(kf_worker *, const kf_linear_args *);
    void (*linear)(kf_worker *, const kf_linear_args *);
    void (*floats)(const kf_weight *, int64_t k, int64_t panel, float *out);
    void (*rows)(const kf_linear_args *, int64_t panel);
    /* Rows [begin, end) of one panel, by one thread, of bfloat16 rows that are prepared. */
    void (*panel)(const kf_linear_args *, int64_t begin, int64_t end, int64_t panel, int fetch_next);
} kf_q_ops;

/* The best of what the processor has, or what kf_set_isa() allows. */
const kf_ops *kf_ops_for(int is_bf16);

/* The product of a quantised weight, called by every thread of a team. For float rows each needs so many bytes of scratch
 * space. */
void kf_q_linear(kf_worker *worker, const kf_linear_args *a, int is_bf16);
int64_t kf_q_scratch(int64_t k);

/* The same in pieces, of any weight: before those of a quantised one with bfloat16 rows, all threads prepare these, and a
 * barrier follows. */
void kf_q_prepare(kf_worker *worker, const kf_linear_args *a);
void kf_panel(kf_worker *worker, const kf_linear_args *a, int64_t begin, int64_t end, int64_t panel, int is_bf16);

static inline int kf_is_gated(kf_epilogue epilogue) { return epilogue == KF_SILU_MUL || epilogue == KF_GELU_MUL; }

#define KF_ROW_BLOCK 96 /* rows of a long step that one thread computes of a panel */

int64_t kf_attention_floats(int64_t head_dim, int64_t longest);
int64_t kf_head_dim_max(void);
#endif
