/* From logits to tokens: one row at a time, so that a row's token depends on nothing but the row. */
#ifndef KF_DRAW_H
#define KF_DRAW_H

#include <stdatomic.h>
#include <stdlib.h>

#include "denormals.h"
#include "estimate.h"
#include "team.h"
#include "weights.h"

#define KF_GREEDY_BELOW 1e-5 /* temperatures under this are greedy, as in vLLM */
#define KF_LN2 0.6931471805599453

__extension__ typedef unsigned __int128 kf_u128;

/* What a request's next token depends on beside its logits. */
typedef struct {
    uint64_t seed;
    int64_t length;  /* output tokens so far, which is the position of the next draw */
    int64_t min_tokens, top_k;
    double temperature, top_p, min_p;
    float repetition, presence, frequency;
    int in_use, counts_prompt, counts_output;
    int64_t logprobs; /* how many of the largest it wants to see; -1: no log probabilities */
    int64_t num_bias, num_stops, num_bans;
    const int32_t *bias_tokens, *stops, *bans; /* owned by the caller; bans: not to be drawn now */
    const float *bias;
    const int32_t *mask; /* a bit for each token that may be drawn, the first in the lowest; NULL: all; the caller's */
    int64_t num_seen, seen_room;
    int32_t *seen, *counts; /* distinct tokens, ascending, and how often each is in the output */
} kf_row;

/* ---- the token log's part */

/* Notes `token` and adds `count` to its number. Returns -1 if there is no memory, with nothing changed. */
static int kf_see(kf_row *row, int32_t token, int32_t count)
{
    int64_t lo = 0, hi = row->num_seen;
    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (row->seen[mid] < token)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < row->num_seen && row->seen[lo] == token) {
        row->counts[lo] += count;
        return 0;
    }
    if (row->num_seen == row->seen_room) {
        const int64_t room = row->seen_room ? 2 * row->seen_room : 64;
        int32_t *grown = realloc(row->seen, (size_t)room * sizeof(int32_t));
        if (grown == NULL)
            return -1;
        row->seen = grown;
        grown = realloc(row->counts, (size_t)room * sizeof(int32_t));
        if (grown == NULL)
            return -1;
        row->counts = grown;
        row->seen_room = room;
    }
    const size_t after = (size_t)(row->num_seen - lo) * sizeof(int32_t);
    memmove(row->seen + lo + 1, row->seen + lo, after);
    memmove(row->counts + lo + 1, row->counts + lo, after);
    row->seen[lo] = token;
    row->counts[lo] = count;
    row->num_seen++;
    return 0;
}

static void kf_row_clear(kf_row *row)
{
    free(row->seen);
    free(row->counts);
    memset(row, 0, sizeof *row);
}

/* Tokens that a draw takes as drawn although the log does not have them yet: drafts, in their order. */
typedef struct {
    const int32_t *tokens;
    int32_t count;
} kf_ahead;

static inline int kf_adjusts(const kf_row *row, kf_ahead ahead)
{
    return row->num_bias > 0 || row->num_bans > 0 || row->num_seen > 0 ||
           (row->counts_output && ahead.count > 0) ||
           (row->num_stops > 0 && row->length + ahead.count < row->min_tokens);
}

static int32_t kf_count_ahead(kf_ahead ahead, int32_t token)
{
    int32_t count = 0;
    for (int32_t i = 0; i < ahead.count; i++)
        count += ahead.tokens[i] == token;
    return count;
}

static int kf_has_seen(const kf_row *row, int32_t token)
{
    int64_t lo = 0, hi = row->num_seen;
    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (row->seen[mid] < token)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < row->num_seen && row->seen[lo] == token;
}

static inline float kf_penalise(const kf_row *row, float v, int32_t count)
{
    if (row->repetition != 1.0f)
        v = v > 0.0f ? v / row->repetition : v * row->repetition;
    if (count > 0) {
        v -= row->frequency * (float)count;
        v -= row->presence;
    }
    return v;
}

/* Whether a mask that allows so many tokens leaves any but these `tokens`, each of which is there once: where it does not,
 * the grammar has the last word. */
static int kf_leaves_others(const kf_row *row, int64_t allowed, const int32_t *tokens, int64_t count)
{
    if (row->mask == NULL)
        return 1;
    for (int64_t i = 0; i < count; i++)
        allowed -= (uint32_t)row->mask[tokens[i] / 32] >> (tokens[i] % 32) & 1;
    return allowed > 0;
}

/* min_tokens, bad words, logit bias, then penalties, in float32. `allowed`: how many tokens the mask leaves. */
static void kf_adjust(const kf_row *row, kf_ahead ahead, float *x, int64_t allowed)
{
    if (row->length + ahead.count < row->min_tokens && kf_leaves_others(row, allowed, row->stops, row->num_stops))
        for (int64_t i = 0; i < row->num_stops; i++)
            x[row->stops[i]] = -INFINITY;
    if (kf_leaves_others(row, allowed, row->bans, row->num_bans))
        for (int64_t i = 0; i < row->num_bans; i++)
            x[row->bans[i]] = -INFINITY;
    for (int64_t i = 0; i < row->num_bias; i++)
        x[row->bias_tokens[i]] += row->bias[i];
    if (!row->counts_output)
        return;
    for (int64_t i = 0; i < row->num_seen; i++) {
        const int32_t token = row->seen[i];
        x[token] = kf_penalise(row, x[token], row->counts[i] + kf_count_ahead(ahead, token));
    }
    for (int32_t i = 0; i < ahead.count; i++) { /* what the log has not, each once */
        const int32_t token = ahead.tokens[i];
        const kf_ahead before = {ahead.tokens, i};
        if (kf_count_ahead(before, token) == 0 && !kf_has_seen(row, token))
            x[token] = kf_penalise(row, x[token], kf_count_ahead(ahead, token));
    }
}

/* Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11): 53 bits for one position.
 * Same numbers as numpy.random.Philox(key=seed, counter=position), which counts once before its first block. */
static uint64_t kf_noise(uint64_t seed, uint64_t position)
{
    uint64_t c0 = position + 1, c1 = c0 == 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
    for (int round = 0; round < 10; round++) {
        const kf_u128 p0 = (kf_u128)0xD2E7470EE14C6C93u * c0, p1 = (kf_u128)0xCA5A826395121157u * c2;
        c0 = (uint64_t)(p1 >> 64) ^ c1 ^ k0;
        c1 = (uint64_t)p1;
        c2 = (uint64_t)(p0 >> 64) ^ c3 ^ k1;
        c3 = (uint64_t)p0;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    return c0 >> 11;
}

/* ---- a draw */

/* The passes' sum and weigh for a row of which a mask may have left little: most blocks have no token, and are not looked
 * at. Sums of weights are exact, so they are the same. Expects the row's tops. */
static int64_t kf_sum_left(const kf_row *row, const kf_scratch *s, const float *x, double best, double scale)
{
    const int64_t n = s->vocab;
    if (row->mask == NULL)
        return s->passes->sum(x, n, best, scale, s->sums);
    const int32_t nothing = kf_order(-INFINITY);
    int64_t total = 0;
    for (int64_t b = 0; b < s->blocks; b++) {
        const int64_t i = b * KF_BLOCK, count = i + KF_BLOCK < n ? KF_BLOCK : n - i;
        s->sums[b] = 0;
        if (s->tops[b] > nothing)
            total += s->passes->sum(x + i, count, best, scale, s->sums + b);
    }
    return total;
}

static int64_t kf_weigh_left(const kf_row *row, const kf_scratch *s, const float *x, double best, double scale,
                             double floor)
{
    const int64_t n = s->vocab;
    if (row->mask == NULL)
        return s->passes->weigh(x, n, best, scale, floor, s->weights, s->sums);
    const int32_t nothing = kf_order(-INFINITY);
    int64_t total = 0;
    for (int64_t b = 0; b < s->blocks; b++) {
        const int64_t i = b * KF_BLOCK, count = i + KF_BLOCK < n ? KF_BLOCK : n - i;
        s->sums[b] = 0;
        if (s->tops[b] > nothing)
            total += s->passes->weigh(x + i, count, best, scale, floor, s->weights + i, s->sums + b);
        else
            memset(s->weights + i, 0, (size_t)count * sizeof *s->weights);
    }
    return total;
}

/* The token at place `pick` of the weights of one block, in order of token id. */
static int64_t kf_in_block(const int64_t *weights, int64_t pick)
{
    int64_t i = 0;
    for (; pick >= weights[i]; i++)
        pick -= weights[i];
    return i;
}

/* Inverts the cumulative distribution, in order of token id, of what min-p, top-k and top-p leave, for the output's token
 * `position`. `all`: the weight of all tokens together, min-p's among them, if it is wanted; else NULL. */
static int64_t kf_draw(const kf_row *row, int64_t position, const float *x, int64_t best, const kf_scratch *s,
                       int64_t *all)
{
    const int64_t n = s->vocab;
    const int top_k = row->top_k > 0 && row->top_k < n, top_p = row->top_p < 1.0;
    const double scale = KF_LOG2E / row->temperature, floor = ceil(row->min_p * (double)(1LL << KF_ONE));
    const int whole = !top_k && !top_p && floor <= 0.0; /* any token may be drawn */
    const kf_u128 noise = kf_noise(row->seed, (uint64_t)position);
    if (whole && all == NULL) {
        const int64_t token = kf_draw_estimated(s, x, x[best], scale, row->mask != NULL, (uint64_t)noise);
        if (token >= 0)
            return token;
    }
    int64_t total = whole ? kf_sum_left(row, s, x, x[best], scale) : kf_weigh_left(row, s, x, x[best], scale, floor);
    if (all != NULL)
        *all = total;
    if (total == 0) /* the best is not finite: penalties or masks left nothing to draw from */
        return best;
    int64_t pick = (int64_t)(noise * (uint64_t)total >> 53), i = 0;
    if (!top_k && !top_p) {
        for (; pick >= s->sums[i]; i++)
            pick -= s->sums[i];
        i *= KF_BLOCK;
        int64_t sum;
        if (whole)
            s->passes->weigh(x + i, i + KF_BLOCK < n ? KF_BLOCK : n - i, x[best], scale, 0.0, s->weights + i, &sum);
        return i + kf_in_block(s->weights + i, pick);
    }
    int64_t count;
    if (top_k) {
        count = s->passes->keep(s->weights, n, kf_top_k_floor(s, row->top_k), s->kept);
        count = kf_top_k(s, count, row->top_k, &total);
    } else
        count = kf_top_p_keep(s, row->top_p, total);
    if (top_p)
        kf_top_p(s, count, row->top_p, &total);
    pick = (int64_t)(noise * (uint64_t)total >> 53);
    for (; pick >= s->weights[s->kept[i]]; i++)
        pick -= s->weights[s->kept[i]];
    return s->kept[i];
}

/* log(sum(exp(x))) of values whose weights at temperature 1 are `total`, without libm, whose last bit differs between
 * machines. */
static double kf_log_sum(double best, int64_t total)
{
    int exponent;
    const double m = frexp((double)total, &exponent); /* exact; m in [1/2, 1) */
    const double z = (m - 0.75) / (m + 0.75);         /* log(m / 0.75) = 2 atanh(z), |z| <= 1/5 */
    double series = 0.0;
    for (int k = 27; k > 0; k -= 2)
        series = series * (z * z) + 1.0 / k;
    const double log_three_quarters = -0.2876820724517809;
    return best + (2.0 * z * series + log_three_quarters + (exponent - KF_ONE) * KF_LN2);
}

static double kf_log_sum_exp(const float *x, const kf_scratch *s)
{
    int finite;
    const double best = x[s->passes->best(x, s->vocab, &finite, s->tops)];
    return kf_log_sum(best, s->passes->sum(x, s->vocab, best, KF_LOG2E, s->sums));
}

/* ---- a batch */

#define KF_POISONED (-1) /* in the place of a token: the logits are not finite */
#define KF_NONE_LEFT (-2) /* the mask, or what is banned beside it, allows no token */
#define KF_REJECTED (-3) /* a draft before it is not what was drawn */

/* Row r of logits [rows, vocab] is that of states[slots[r]]. Where a token was drawn, norms[r] is the log of the sum of the
 * exponentials that the mask leaves if it has `tops`, and the wanted largest are at top + r * top_stride.
 *
 * Rows of one request follow one another: row r is drawn as if the depths[r] drafts before it, the last of them drafts[r],
 * were its output already. depths NULL: no row has any. masks [rows, vocab / 32 rounded up]: what such a row of a request
 * with a mask may be; NULL: none of them can be drawn. */
typedef struct {
    const float *logits;
    int64_t rows, vocab, top_stride;
    const int32_t *slots, *depths, *drafts, *masks;
    const kf_row *states;
    int isa;
    int64_t *tokens;
    double *norms;
    kf_top *top;
    atomic_llong next; /* row that nobody has taken */
} kf_batch;

static void kf_sample_row(const kf_batch *batch, int64_t r, const kf_scratch *s)
{
    const kf_row *row = batch->states + batch->slots[r];
    const float *x = batch->logits + r * s->vocab;
    const int32_t depth = batch->depths == NULL ? 0 : batch->depths[r];
    const kf_ahead ahead = {depth ? batch->drafts + r - depth + 1 : NULL, depth};
    kf_row masked;
    if (depth && row->mask != NULL) {
        if (batch->masks == NULL) {
            batch->tokens[r] = KF_REJECTED;
            return;
        }
        masked = *row;
        masked.mask = batch->masks + r * ((s->vocab + 31) / 32);
        row = &masked;
    }
    int finite;
    int64_t all = 0, allowed = s->vocab, best;
    if (row->mask == NULL)
        best = s->passes->best(x, s->vocab, &finite, s->tops);
    else {
        best = s->passes->best_left(x, s->vocab, row->mask, s->logits, &finite, s->tops, &allowed);
        x = s->logits;
    }
    if (!finite || allowed == 0) {
        batch->tokens[r] = finite ? KF_NONE_LEFT : KF_POISONED;
        return;
    }
    const int greedy = row->temperature < KF_GREEDY_BELOW, adjusts = kf_adjusts(row, ahead);
    /* A plain draw weighs the tokens as their probabilities do. */
    const int shared = !greedy && !adjusts && row->temperature == 1.0 && row->min_p <= 0.0;
    const double raw_best = x[best];
    if (row->logprobs > 0)
        kf_largest(s, x, row->logprobs, batch->top + r * batch->top_stride);
    if (row->logprobs >= 0 && !shared)
        batch->norms[r] = kf_log_sum(raw_best, kf_sum_left(row, s, x, raw_best, KF_LOG2E));
    if (adjusts) {
        if (x != s->logits)
            memcpy(s->logits, x, (size_t)s->vocab * sizeof(float));
        kf_adjust(row, ahead, s->logits, allowed);
        x = s->logits;
        best = s->passes->best(x, s->vocab, &finite, s->tops);
        if (row->num_bans > 0 && x[best] == -INFINITY) {
            batch->tokens[r] = KF_NONE_LEFT;
            return;
        }
    }
    const int sums = row->logprobs >= 0 && shared;
    batch->tokens[r] = greedy ? best : kf_draw(row, row->length + depth, x, best, s, sums ? &all : NULL);
    if (sums)
        batch->norms[r] = kf_log_sum(raw_best, all);
}

/* Every thread of a team: rows, one after the other. Expects scratch of kf_scratch_place() bytes. */
static void kf_sample_rows(kf_worker *w, const void *arg)
{
    kf_batch *batch = (kf_batch *)arg;
    kf_scratch s = {.passes = kf_passes_for(batch->isa)};
    kf_scratch_place(&s, batch->vocab, w->scratch);
    const uint64_t old = kf_denormals(0); /* the numbers here are IEEE's: a team's are not */
    for (int64_t r; (r = atomic_fetch_add(&batch->next, 1)) < batch->rows;)
        kf_sample_row(batch, r, &s);
    kf_denormals_restore(old);
}

#endif
