/* One rank of a stage: its heads and its shards of the FFN; sums over all ranks' shards come from an exchange. */
#ifndef KF_RANK_H
#define KF_RANK_H
#include "exchange.h"
#include "kernels.h"

/* Attention with some of the heads, the same number in each layer. cut: of `o`, whose inputs are these heads'. */
typedef struct {
    kf_weight qkv, o;
} kf_heads_layer;

typedef struct {
    const kf_heads_layer *layers; /* NULL: this part has no heads */
    kf_cache kv;                  /* kv_heads: of this part */
    kf_cut cut;
    int64_t heads; /* query heads */
    void *normed, *qkv, *q, *attended; /* [>= rows, ...]; normed: of the data-parallel part only */
} kf_heads;

/* stage: as of a whole one, but `o` of a layer is its bias only, and gate_up and down are those of own shards; head is a part
 * of the vocabulary. intermediate, down_cut [layer]: of own shards. o_limit, down_limit: of a partial sum. */
typedef struct {
    const kf_stage *stage;
    kf_heads tensor_parallel, data_parallel;
    const int64_t *intermediate;
    const kf_cut *down_cuts;
    float o_limit, down_limit;
    kf_exchange *exchange;
    int64_t timeout_ns;
} kf_rank;

/* A step of all ranks. owned: those rows of it whose data-parallel heads this rank computes, with their own slots and
 * tables, places[i] being the token of the step that is its token i. *outcome: as of kf_exchange_reduce(); if it is not
 * KF_REDUCED nothing is in io->out. */
int kf_rank_forward(kf_team *team, const kf_rank *rank, const kf_step *step, const kf_step *owned, const int32_t *places,
                    const kf_io *io, int *outcome);
#endif
