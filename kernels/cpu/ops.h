/* The kernels of one element type on one instruction set. Each is called by every thread of a team. */
#ifndef KF_OPS_H
#define KF_OPS_H
#include "kernels.h"

typedef struct {
    void (*attention)(kf_worker *, const kf_attention_args *);
    void (*rope_write)(kf_worker *, const kf_rope_args *);
    void (*rms_norm)(kf_worker *, const kf_norm_args *);
    void (*linear)(kf_worker *, const kf_linear_args *);
} kf_ops;

/* Of quantised weights: q_linear takes what q_prepare, by all threads, has made of its rows before. */
typedef struct {
    void (*prepare)(kf_worker *, const kf_linear_args *);
    void (*linear)(kf_worker *, const kf_linear_args *);
} kf_q_ops;

/* The best of what the processor has, or what kf_set_isa() allows. */
const kf_ops *kf_ops_for(int is_bf16);
const kf_q_ops *kf_q_ops_for(int is_bf16);

int64_t kf_attention_floats(int64_t head_dim, int64_t longest);
int64_t kf_head_dim_max(void);
#endif
