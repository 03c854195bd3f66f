/* Layers that are mixtures of experts, as part of a step: see kf_experts.
 *
 * Rows are put together by expert, so that an expert's weights are read once for all that chose it, and come back to
 * their places. A product's row has the same bits in any company, and a row adds up its experts in the order of its own
 * choice: so it does not matter what others chose. */
#include <string.h>

#include "experts.h"

#define ROWS 8 /* taken at a time by a thread */

static int panels_of(const kf_linear_args *a)
{
    const int64_t columns = kf_is_gated(a->epilogue) ? (a->n + 31) / 32 * KF_PANEL : a->n;
    return (int)((columns + KF_PANEL - 1) / KF_PANEL);
}

static int64_t blocks_of(int64_t rows)
{
    return rows > 2 * KF_ROW_BLOCK ? (rows + KF_ROW_BLOCK - 1) / KF_ROW_BLOCK : rows > 0;
}

/* The product of each expert with its own rows: `all` says what is the same for all of them. */
static void products(kf_worker *w, const kf_linear_args *all, const kf_weight *weights, const kf_experts *e,
                     const int32_t *first, size_t value_bytes, int is_bf16)
{
    const int64_t panels = panels_of(all), prepared_bytes = kf_prepared_size(all->k);
    int quantised = 0;
    for (int64_t i = 0; i < e->experts; i++)
        quantised |= weights[i].format != KF_DENSE;
    if (quantised && is_bf16) {
        kf_q_prepare(w, all);
        kf_barrier(w);
    }
    int64_t total = 0, base = 0, expert = 0;
    for (int64_t i = 0; i < e->experts; i++)
        total += panels * blocks_of(first[i + 1] - first[i]);
    const int64_t grain = 1 + total / (16 * kf_team_threads(w->team));
    for (int64_t unit, end; kf_next(w, total, grain, &unit, &end);)
        for (; unit < end; unit++) {
            int64_t rows = first[expert + 1] - first[expert], blocks = blocks_of(rows);
            for (; unit - base >= panels * blocks; blocks = blocks_of(rows)) {
                base += panels * blocks;
                expert++;
                rows = first[expert + 1] - first[expert];
            }
            kf_linear_args one = *all;
            one.w = weights[expert];
            one.x = (const char *)all->x + (size_t)(first[expert] * all->k) * value_bytes;
            one.out = (char *)all->out + (size_t)(first[expert] * all->n) * value_bytes;
            one.prepared = (char *)all->prepared + first[expert] * prepared_bytes;
            one.rows = rows;
            const int64_t panel = (unit - base) / blocks, block = (unit - base) % blocks;
            kf_panel(w, &one, block * rows / blocks, (block + 1) * rows / blocks, panel, is_bf16);
            kf_beat(w);
        }
    kf_barrier(w);
}

/* Where each expert's rows begin, and where each row's go. */
static void place(const kf_experts *e, const kf_routes *r, int64_t rows)
{
    int32_t *next = r->first + e->experts + 1;
    memset(r->first, 0, (size_t)(e->experts + 1) * sizeof *r->first);
    for (int64_t i = 0; i < rows * e->chosen; i++)
        r->first[r->expert[i] + 1]++;
    for (int64_t i = 0; i < e->experts; i++) {
        r->first[i + 1] += r->first[i];
        next[i] = r->first[i];
    }
    for (int64_t i = 0; i < rows * e->chosen; i++)
        r->place[i] = next[r->expert[i]]++;
}

void kf_run_experts(kf_worker *w, const kf_ops *ops, const kf_experts *e, const kf_routes *r, const kf_experts_io *io)
{
    const size_t value_bytes = io->is_bf16 ? 2 : 4, row_bytes = (size_t)io->hidden * value_bytes;
    const int64_t gathered = io->rows * e->chosen;
    const kf_linear_args router = {io->x, e->router, r->logits, r->prepared, io->rows, io->hidden, e->experts, KF_FLOAT, 0};
    ops->linear(w, &router);
    kf_barrier(w);
    const kf_route_args route = {r->logits, r->weights, r->expert, io->rows, e->experts, e->chosen, e->normalised};
    ops->route(w, &route);
    kf_barrier(w);
    for (int64_t begin, end; kf_next(w, 1, 1, &begin, &end);)
        place(e, r, io->rows);
    kf_barrier(w);
    for (int64_t begin, end; kf_next(w, gathered, ROWS, &begin, &end);)
        for (int64_t i = begin; i < end; i++)
            memcpy((char *)r->gathered + (size_t)r->place[i] * row_bytes,
                   (const char *)io->x + (size_t)(i / e->chosen) * row_bytes, row_bytes);
    kf_barrier(w);
    const kf_linear_args gate_up = {r->gathered, {0}, r->activated, r->prepared, gathered, io->hidden, e->intermediate,
                                    io->gated, 0};
    products(w, &gate_up, e->gate_up, e, r->first, value_bytes, io->is_bf16);
    const kf_linear_args down = {r->activated, {0}, r->out, r->prepared, gathered, e->intermediate, io->hidden, KF_STORE, 0};
    products(w, &down, e->down, e, r->first, value_bytes, io->is_bf16);
    const kf_combine_args combine = {r->out, r->weights, r->place, io->out, io->rows, io->hidden, e->chosen, io->add};
    ops->combine(w, &combine);
    kf_barrier(w);
}
