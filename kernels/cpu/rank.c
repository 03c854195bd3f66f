#include "rank.h"

#include <string.h>

#include "stage.h"

#define ROWS 8 /* taken at a time by a thread that copies */

/* What the threads of a rank share beside the step. `totals` and `outcome` are written by the first thread only, and read
 * by the others behind a barrier. */
typedef struct {
    kf_forward forward;
    const kf_rank *rank;
    const kf_step *owned;
    const int32_t *places;
    int64_t *place; /* of this rank's contribution */
    const int64_t *totals;
    int outcome;
} rank_forward;

static void clear_place(kf_worker *w, const rank_forward *f)
{
    const int64_t n = f->forward.stage->hidden;
    for (int64_t begin, end; kf_next(w, f->forward.step->tokens, ROWS, &begin, &end);)
        memset(f->place + begin * n, 0, (size_t)((end - begin) * n) * sizeof *f->place);
    kf_barrier(w);
}

/* The attention of these heads, as far as its share of `o`, which goes to `place`. */
static void run_heads(kf_worker *w, const rank_forward *f, const kf_heads *part, int64_t index, const kf_step *step,
                      const void *normed, const int32_t *places)
{
    const kf_stage *s = f->forward.stage;
    const kf_ops *ops = f->forward.ops;
    const kf_layer *layer = &s->layers[index];
    const int64_t rows = step->tokens, hd = part->kv.head_dim, qkv = (part->heads + 2 * part->kv.kv_heads) * hd;
    const kf_linear_args project = {normed, part->layers[index].qkv, part->qkv, NULL, rows, s->hidden, qkv, KF_STORE, 0, NULL};
    ops->linear(w, &project);
    kf_barrier(w);
    const kf_rope_args rope = {&part->kv, step, index, part->heads, qkv, s->rotated, s->cos[layer->table],
                               s->sin[layer->table], layer->q_norm, layer->k_norm, s->eps, s->norm_wide, part->qkv, part->q};
    ops->rope_write(w, &rope);
    kf_barrier(w);
    const kf_attention_args attend = {&part->kv, step, index, part->heads, layer->window, s->scale, part->q, part->attended};
    ops->attention(w, &attend);
    kf_barrier(w);
    const kf_sum sum = {part->cut, f->rank->o_limit, f->place, places, places != NULL};
    const kf_linear_args out = {part->attended, part->layers[index].o, NULL, NULL, rows, part->heads * hd, s->hidden,
                                KF_STORE, 0, &sum};
    ops->linear(w, &out);
    kf_barrier(w);
}

/* The contributions of all ranks are added up, and become part of the residual. False: the exchange is over. */
static int finish(kf_worker *w, rank_forward *f, const kf_weight *weight, const float *norm)
{
    const kf_stage *s = f->forward.stage;
    const int64_t rows = f->forward.step->tokens;
    if (w->index == 0) {
        kf_beat(w);
        f->outcome = kf_exchange_reduce(f->rank->exchange, rows * s->hidden, f->rank->timeout_ns, &f->totals);
        f->place = kf_exchange_place(f->rank->exchange);
    }
    kf_barrier(w);
    if (f->outcome != KF_REDUCED)
        return 0;
    const kf_linear_args out = {NULL, *weight, norm ? s->normed : s->residual, NULL, rows, 0, s->hidden,
                                norm ? KF_STORE : KF_ADD, 0, NULL};
    f->forward.ops->fixed_finish(w, &out, f->totals);
    kf_barrier(w);
    if (norm)
        kf_add_normed(w, &f->forward, norm);
    return 1;
}

static void norm_rows(kf_worker *w, const rank_forward *f, const float *weight)
{
    const kf_stage *s = f->forward.stage;
    const kf_norm_args norm = {s->residual, weight, s->normed, f->forward.step->tokens, s->hidden, s->eps, s->norm_wide, 0};
    f->forward.ops->rms_norm(w, &norm);
    kf_barrier(w);
}

static int run_layer(kf_worker *w, rank_forward *f, int64_t index)
{
    const kf_rank *rank = f->rank;
    const kf_stage *s = f->forward.stage;
    const kf_layer *layer = &s->layers[index];
    const int64_t rows = f->forward.step->tokens, width = rank->intermediate[index];
    const size_t size = f->forward.row_bytes;

    norm_rows(w, f, layer->attention_norm);
    if (rank->tensor_parallel.layers)
        run_heads(w, f, &rank->tensor_parallel, index, f->forward.step, s->normed, NULL);
    else
        clear_place(w, f);
    if (rank->data_parallel.layers && f->owned->tokens) {
        for (int64_t begin, end; kf_next(w, f->owned->tokens, ROWS, &begin, &end);)
            for (int64_t i = begin; i < end; i++)
                memcpy((char *)rank->data_parallel.normed + (size_t)i * size,
                       (const char *)s->normed + (size_t)f->places[i] * size, size);
        kf_barrier(w);
        run_heads(w, f, &rank->data_parallel, index, f->owned, rank->data_parallel.normed, f->places);
    }
    if (!finish(w, f, &layer->o, layer->attention_out_norm))
        return 0;

    norm_rows(w, f, layer->mlp_norm);
    if (width) {
        const kf_linear_args gate_up = {s->normed, layer->gate_up, s->activated, NULL, rows, s->hidden, width, s->gated, 0, NULL};
        f->forward.ops->linear(w, &gate_up);
        kf_barrier(w);
        const kf_sum sum = {rank->down_cuts[index], rank->down_limit, f->place, NULL, 0};
        const kf_linear_args down = {s->activated, layer->down, NULL, NULL, rows, width, s->hidden, KF_STORE, 0, &sum};
        f->forward.ops->linear(w, &down);
        kf_barrier(w);
    } else {
        clear_place(w, f);
    }
    return finish(w, f, &layer->down, layer->mlp_out_norm);
}

static void forward(kf_worker *w, const void *arg)
{
    rank_forward *f = (rank_forward *)arg; /* what the threads share: see there */
    kf_load(w, &f->forward);
    for (int64_t i = 0; i < f->forward.stage->num_layers; i++)
        if (!run_layer(w, f, i))
            return;
    if (f->rank->stage->norm == NULL)
        kf_store(w, &f->forward);
    else if (f->forward.io->num_picked)
        kf_logits(w, &f->forward);
}

static int check_part(kf_team *team, const kf_heads *part, const kf_stage *stage, const kf_step *step)
{
    if (part->layers == NULL)
        return KF_OK;
    int bad = kf_check_cache(&part->kv, stage->num_layers - 1, step);
    if (!bad)
        bad = kf_check_positions(&part->kv, step, stage->table_rows);
    return bad ? bad : kf_reserve_scratch(team, &part->kv, step);
}

int kf_rank_forward(kf_team *team, const kf_rank *rank, const kf_step *step, const kf_step *owned, const int32_t *places,
                    const kf_io *io, int *outcome)
{
    const kf_heads *all = &rank->tensor_parallel, *own = &rank->data_parallel;
    int bad = check_part(team, all, rank->stage, step);
    if (!bad)
        bad = check_part(team, own, rank->stage, owned);
    if (!bad)
        bad = kf_check_io(rank->stage, step, io);
    for (int64_t i = 0; !bad && i < owned->tokens; i++)
        if (places[i] < 0 || places[i] >= step->tokens)
            bad = KF_BAD_ROW;
    if (bad)
        return bad;
    const kf_cache *kv = all->layers ? &all->kv : &own->kv;
    const size_t row_bytes = (size_t)rank->stage->hidden * (kv->is_bf16 ? 2 : 4);
    rank_forward f = {{rank->stage, kv, step, io, kf_ops_for(kv->is_bf16), row_bytes}, rank, owned, places,
                      kf_exchange_place(rank->exchange), NULL, KF_REDUCED};
    kf_team_run(team, forward, &f);
    *outcome = f.outcome;
    return KF_OK;
}
