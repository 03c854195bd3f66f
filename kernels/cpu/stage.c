/* A stage's layers as one computation of a team, and its operations one by one. Everything that indexes memory is
 * checked before any thread begins. */
#include "stage.h"

#include <string.h>

#include "experts.h"

#define COPY_ROWS 8 /* taken at a time by a thread that copies */

int kf_check_cache(const kf_cache *kv, int64_t layer, const kf_step *step)
{
    if (kv->head_dim > kf_head_dim_max() || layer < 0 || layer >= kv->layers)
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

int kf_check_positions(const kf_cache *kv, const kf_step *step, int64_t table_rows)
{
    for (int64_t t = 0; t < step->tokens; t++) {
        if (step->positions[t] < 0 || step->positions[t] >= table_rows)
            return KF_BAD_POSITION;
        if (step->slots[t] < 0 || step->slots[t] / kv->block_size >= kv->num_blocks)
            return KF_BAD_BLOCK;
    }
    return KF_OK;
}

int kf_check_io(const kf_stage *s, const kf_step *step, const kf_io *io)
{
    for (int64_t t = 0; io->tokens && t < step->tokens; t++)
        if (io->tokens[t] < 0 || io->tokens[t] >= s->vocab)
            return KF_BAD_TOKEN;
    for (int64_t i = 0; i < io->num_picked; i++)
        if (io->picked[i] < 0 || io->picked[i] >= step->tokens)
            return KF_BAD_ROW;
    return KF_OK;
}

int kf_reserve_scratch(kf_team *team, const kf_cache *kv, const kf_step *step)
{
    int64_t longest = 0;
    for (int64_t b = 0; b < step->rows; b++)
        if (step->context_lens[b] > longest)
            longest = step->context_lens[b];
    int64_t bytes = kf_attention_floats(kv->head_dim, longest) * (int64_t)sizeof(float);
    return kf_team_scratch(team, bytes) ? KF_OK : KF_NO_MEMORY;
}

/* Room for a panel of the widest weight that is quantised, which float rows need. */
static int reserve_floats(kf_team *team, const kf_stage *s, const kf_cache *kv)
{
    int64_t widest = s->head.format != KF_DENSE ? s->hidden : 0;
#define WIDER(w, k)                              \
    if ((w).format != KF_DENSE && (k) > widest) \
        widest = (k);
    for (int64_t i = 0; i < s->num_layers; i++) {
        WIDER(s->layers[i].qkv, s->hidden)
        WIDER(s->layers[i].o, s->heads * kv->head_dim)
        WIDER(s->layers[i].gate_up, s->hidden)
        WIDER(s->layers[i].down, s->intermediate)
        const kf_experts *e = s->layers[i].experts;
        for (int64_t j = 0; e && j < e->experts; j++) {
            WIDER(e->gate_up[j], s->hidden)
            WIDER(e->down[j], e->intermediate)
        }
    }
#undef WIDER
    return kv->is_bf16 || kf_team_scratch(team, kf_q_scratch(widest)) ? KF_OK : KF_NO_MEMORY;
}

/* ------------------------------------------------------------------ a whole step */

void kf_any_linear(kf_worker *w, const kf_ops *ops, const kf_linear_args *a, int is_bf16)
{
    if (a->w.format == KF_DENSE)
        ops->linear(w, a);
    else
        kf_q_linear(w, a, is_bf16);
}

/* A product whose inputs may be cut into shards. */
static void cut_linear(kf_worker *w, const kf_ops *ops, kf_linear_args a, const kf_cut *cut, int is_bf16)
{
    const kf_sum sum = {*cut, KF_FIXED_LIMIT / (float)cut->shards, NULL, NULL, 0};
    a.sum = cut->ends ? &sum : NULL;
    kf_any_linear(w, ops, &a, is_bf16);
}

void kf_load(kf_worker *w, const kf_forward *f)
{
    const size_t size = f->row_bytes;
    for (int64_t begin, end; kf_next(w, f->step->tokens, COPY_ROWS, &begin, &end);)
        for (int64_t row = begin; row < end; row++) {
            const char *from = f->io->tokens ? (const char *)f->stage->embed + (size_t)f->io->tokens[row] * size
                                             : (const char *)f->io->hidden + (size_t)row * size;
            char *to = (char *)f->stage->residual + (size_t)row * size;
            memcpy(to, from, size);
            if (f->io->tokens && f->stage->embed_scale != 1.0f)
                f->ops->scale(to, f->stage->hidden, f->stage->embed_scale);
        }
    kf_barrier(w);
}

/* Whether a value's exponent is all ones: an infinity, or no number at all. */
static int any_nonfinite(const void *values, int64_t n, int is_bf16)
{
    int found = 0;
    for (int64_t i = 0; i < n; i++)
        found |= is_bf16 ? (((const uint16_t *)values)[i] & 0x7F80) == 0x7F80
                         : (((const uint32_t *)values)[i] & 0x7F800000) == 0x7F800000;
    return found;
}

void kf_store(kf_worker *w, const kf_forward *f)
{
    const size_t size = f->row_bytes;
    for (int64_t begin, end; kf_next(w, f->step->tokens, COPY_ROWS, &begin, &end);) {
        const char *rows = (char *)f->stage->residual + (size_t)begin * size;
        memcpy((char *)f->io->out + (size_t)begin * size, rows, (size_t)(end - begin) * size);
        if (any_nonfinite(rows, (end - begin) * f->stage->hidden, f->kv->is_bf16))
            __atomic_store_n(f->io->nonfinite, 1, __ATOMIC_RELAXED);
    }
}

void kf_logits(kf_worker *w, const kf_forward *f)
{
    const kf_stage *s = f->stage;
    const int64_t rows = f->io->num_picked;
    for (int64_t begin, end; kf_next(w, rows, COPY_ROWS, &begin, &end);)
        for (int64_t i = begin; i < end; i++)
            memcpy((char *)s->picked + (size_t)i * f->row_bytes,
                   (char *)s->residual + (size_t)f->io->picked[i] * f->row_bytes, f->row_bytes);
    kf_barrier(w);
    const kf_norm_args norm = {s->picked, s->norm, s->normed, rows, s->hidden, s->eps, s->norm_wide, 0};
    f->ops->rms_norm(w, &norm);
    kf_barrier(w);
    const kf_linear_args head = {s->normed, s->head, f->io->out, s->prepared, rows, s->hidden, s->head_rows, KF_FLOAT, 0, NULL};
    kf_any_linear(w, f->ops, &head, f->kv->is_bf16);
    if (s->softcap > 0.0f) {
        kf_barrier(w);
        f->ops->softcap(w, f->io->out, rows * s->head_rows, s->softcap);
    }
}

/* x becomes normed where it is added to the residual. */
void kf_add_normed(kf_worker *w, const kf_forward *f, const float *weight)
{
    const kf_stage *s = f->stage;
    const kf_norm_args norm = {s->normed, weight, s->residual, f->step->tokens, s->hidden, s->eps, s->norm_wide, 1};
    f->ops->rms_norm(w, &norm);
    kf_barrier(w);
}

static void run_mlp(kf_worker *w, const kf_forward *f, const kf_layer *layer)
{
    const kf_stage *s = f->stage;
    const int64_t rows = f->step->tokens;
    const int is_bf16 = f->kv->is_bf16, adds = layer->mlp_out_norm == NULL;
    void *out = adds ? s->residual : s->normed;
    if (layer->experts) {
        const kf_experts_io io = {s->normed, out, rows, s->hidden, s->gated, adds, is_bf16};
        kf_run_experts(w, f->ops, layer->experts, &s->routes, &io);
    } else {
        const kf_linear_args gate_up = {s->normed, layer->gate_up, s->activated, s->prepared, rows, s->hidden,
                                        s->intermediate, s->gated, 0};
        kf_any_linear(w, f->ops, &gate_up, is_bf16);
        kf_barrier(w);
        const kf_linear_args down = {s->activated, layer->down, out, s->prepared, rows, s->intermediate, s->hidden,
                                     adds ? KF_ADD : KF_STORE, 0};
        cut_linear(w, f->ops, down, &layer->down_cut, is_bf16);
        kf_barrier(w);
    }
    if (!adds)
        kf_add_normed(w, f, layer->mlp_out_norm);
}

static void run_layer(kf_worker *w, const kf_forward *f, int64_t index)
{
    const kf_stage *s = f->stage;
    const kf_layer *layer = &s->layers[index];
    const int64_t rows = f->step->tokens, hd = f->kv->head_dim;
    const int64_t qkv = (s->heads + 2 * f->kv->kv_heads) * hd;

    const kf_norm_args before = {s->residual, layer->attention_norm, s->normed, rows, s->hidden, s->eps,
                                 s->norm_wide, 0};
    f->ops->rms_norm(w, &before);
    kf_barrier(w);
    const kf_linear_args project = {s->normed, layer->qkv, s->qkv, s->prepared, rows, s->hidden, qkv, KF_STORE, 0};
    kf_any_linear(w, f->ops, &project, f->kv->is_bf16);
    kf_barrier(w);
    const kf_rope_args rope = {f->kv, f->step, index, s->heads, qkv, s->rotated, s->cos[layer->table],
                               s->sin[layer->table], layer->q_norm, layer->k_norm, s->eps, s->norm_wide, s->qkv, s->q};
    f->ops->rope_write(w, &rope);
    kf_barrier(w);
    const kf_attention_args attend = {f->kv, f->step, index, s->heads, layer->window, s->scale, s->q, s->attended};
    f->ops->attention(w, &attend);
    kf_barrier(w);
    const int adds = layer->attention_out_norm == NULL;
    const kf_linear_args out = {s->attended, layer->o, adds ? s->residual : s->normed, s->prepared, rows, s->heads * hd,
                                s->hidden, adds ? KF_ADD : KF_STORE, 0};
    cut_linear(w, f->ops, out, &layer->o_cut, f->kv->is_bf16);
    kf_barrier(w);
    if (!adds)
        kf_add_normed(w, f, layer->attention_out_norm);
    const kf_norm_args after = {s->residual, layer->mlp_norm, s->normed, rows, s->hidden, s->eps, s->norm_wide, 0};
    f->ops->rms_norm(w, &after);
    kf_barrier(w);
    run_mlp(w, f, layer);
}

static void forward(kf_worker *w, const void *arg)
{
    const kf_forward *f = arg;
    kf_load(w, f);
    for (int64_t i = 0; i < f->stage->num_layers; i++)
        run_layer(w, f, i);
    if (f->stage->head.w == NULL)
        kf_store(w, f);
    else if (f->io->num_picked)
        kf_logits(w, f);
}

int kf_stage_forward(kf_team *team, const kf_stage *stage, const kf_cache *kv, const kf_step *step, const kf_io *io)
{
    int bad = kf_check_cache(kv, stage->num_layers - 1, step);
    if (!bad)
        bad = kf_check_positions(kv, step, stage->table_rows);
    if (!bad)
        bad = kf_check_io(stage, step, io);
    if (!bad)
        bad = kf_reserve_scratch(team, kv, step);
    if (!bad)
        bad = reserve_floats(team, stage, kv);
    if (bad)
        return bad;
    const size_t row_bytes = (size_t)stage->hidden * (kv->is_bf16 ? 2 : 4);
    const kf_forward f = {stage, kv, step, io, kf_ops_for(kv->is_bf16), row_bytes};
    kf_team_run(team, forward, &f);
    return KF_OK;
}

/* ------------------------------------------------------------------ single operations */

typedef struct {
    const kf_ops *ops;
    const void *args;
    int is_bf16;
} one_args;

static void one_attention(kf_worker *w, const void *arg)
{
    const one_args *one = arg;
    one->ops->attention(w, one->args);
}

static void one_rope_write(kf_worker *w, const void *arg)
{
    const one_args *one = arg;
    one->ops->rope_write(w, one->args);
}

static void one_rms_norm(kf_worker *w, const void *arg)
{
    const one_args *one = arg;
    one->ops->rms_norm(w, one->args);
}

static void one_linear(kf_worker *w, const void *arg)
{
    const one_args *one = arg;
    kf_any_linear(w, one->ops, one->args, one->is_bf16);
}

int kf_attention(kf_team *team, const kf_attention_args *a)
{
    int bad = kf_check_cache(a->kv, a->layer, a->step);
    if (!bad)
        bad = kf_reserve_scratch(team, a->kv, a->step);
    if (bad)
        return bad;
    kf_team_run(team, one_attention, &(one_args){kf_ops_for(a->kv->is_bf16), a, 0});
    return KF_OK;
}

int kf_rope_write(kf_team *team, const kf_rope_args *a, int64_t table_rows)
{
    int bad = kf_check_cache(a->kv, a->layer, a->step);
    if (!bad)
        bad = kf_check_positions(a->kv, a->step, table_rows);
    if (bad)
        return bad;
    kf_team_run(team, one_rope_write, &(one_args){kf_ops_for(a->kv->is_bf16), a, 0});
    return KF_OK;
}

void kf_rms_norm(kf_team *team, const kf_norm_args *a, int is_bf16)
{
    kf_team_run(team, one_rms_norm, &(one_args){kf_ops_for(is_bf16), a, 0});
}

int kf_linear(kf_team *team, const kf_linear_args *a, int is_bf16)
{
    if (a->w.format != KF_DENSE && !is_bf16 && !kf_team_scratch(team, kf_q_scratch(a->k)))
        return KF_NO_MEMORY;
    kf_team_run(team, one_linear, &(one_args){kf_ops_for(is_bf16), a, is_bf16});
    return KF_OK;
}
