/* What a step needs of mixtures of experts. */
#ifndef KF_EXPERTS_H
#define KF_EXPERTS_H
#include "ops.h"

/* Rows x [rows, hidden]; what the experts make of them is stored in out or, with `add`, added to it. */
typedef struct {
    const void *x;
    void *out;
    int64_t rows, hidden;
    kf_epilogue gated; /* KF_SILU_MUL or KF_GELU_MUL */
    int add, is_bf16;
} kf_experts_io;

/* By every thread of a team; ends with a barrier. */
void kf_run_experts(kf_worker *w, const kf_ops *ops, const kf_experts *e, const kf_routes *r, const kf_experts_io *io);
#endif
