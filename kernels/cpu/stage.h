/* What a whole stage and one rank of a stage have in common: a step's beginning and end. */
#ifndef KF_STAGE_H
#define KF_STAGE_H
#include <stddef.h>

#include "ops.h"

typedef struct {
    const kf_stage *stage;
    const kf_cache *kv;
    const kf_step *step;
    const kf_io *io;
    const kf_ops *ops;
    size_t row_bytes; /* of [hidden] */
} kf_forward;

/* Each returns KF_OK or what is wrong: everything that indexes memory is checked before any thread begins. */
int kf_check_cache(const kf_cache *kv, int64_t layer, const kf_step *step);
int kf_check_positions(const kf_cache *kv, const kf_step *step, int64_t table_rows);
int kf_check_io(const kf_stage *s, const kf_step *step, const kf_io *io);
int kf_reserve_scratch(kf_team *team, const kf_cache *kv, const kf_step *step);

/* By all threads: of any weight; the rows of tokens or of the stage before, the activations, and the logits. kf_load() and
 * kf_add_normed(), by which `normed` becomes normed where it is added to the residual, end with a barrier. */
void kf_any_linear(kf_worker *w, const kf_ops *ops, const kf_linear_args *a, int is_bf16);
void kf_load(kf_worker *w, const kf_forward *f);
void kf_store(kf_worker *w, const kf_forward *f);
void kf_logits(kf_worker *w, const kf_forward *f);
void kf_add_normed(kf_worker *w, const kf_forward *f, const float *weight);
#endif
