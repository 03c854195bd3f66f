/* A draw from all tokens by sums that are nearly right, where these already say which token it is.
 *
 * Whether the token comes behind a boundary between two tokens is the sign of u * rest - (1 - u) * before, of a number u in
 * [0, 1) and of what the tokens on either side weigh. So nobody has to know the sums to the last bit, unless the draw is
 * next to a boundary: then the exact sums decide. The token is the same either way, and the estimate takes a third of the
 * time: floats have twice the lanes of doubles, and need fewer terms. It may use fused multiply-adds, since its bits are
 * seen by nobody. */
#ifndef KF_ESTIMATE_H
#define KF_ESTIMATE_H

#include "weights.h"

/* How far an estimate may be off, as a part of itself: 1.85 * 2^-24 for each token (its last rounding 1, those before it
 * 0.45, the two of the power's fraction 0.35, the polynomial 0.05), and 2^-24 for each of two additions of floats. And how far
 * for each token, in units of a weight: the exact one is rounded to an integer. */
#define KF_ESTIMATE_OFF 0x4p-24
#define KF_TOKEN_OFF 1.0
#define KF_POWER_MAX 32768.0 /* of the best logit times `scale`: for larger ones the fraction of a float says too little */

/* How `scale` and the best logit are given to the pass. Returns 0 if they are no numbers that it could work with. */
static int kf_powers_of(double best, double scale, kf_powers *powers)
{
    const double largest = best * scale;
    if (!(fabs(largest) <= KF_POWER_MAX && scale >= 0x1p-60 && scale <= 0x1p60))
        return 0;
    const double whole = floor(largest + 0.5);
    powers->scale = (float)scale;
    powers->scale_rest = (float)(scale - (double)powers->scale);
    powers->lowest = (float)((whole - 64.0) / scale); /* these weigh nothing */
    powers->round = (float)(KF_ROUND_FLOAT - whole);
    powers->unit = exp2(KF_ONE + whole - largest);
    return 1;
}

/* The estimated weight of each block to s->estimates; that of the whole row is returned, or -1 if there is no estimate.
 * Expects the row's tops if there is a mask: a block that it empties weighs nothing. */
static double kf_estimate(const kf_scratch *s, const float *x, double best, double scale, int masked)
{
    kf_powers powers;
    if (s->passes->estimate == NULL || !kf_powers_of(best, scale, &powers))
        return -1.0;
    const int32_t nothing = kf_order(-INFINITY);
    double total = 0.0;
    for (int64_t b = 0; b < s->blocks; b++) {
        const int64_t i = b * KF_BLOCK, count = i + KF_BLOCK < s->vocab ? KF_BLOCK : s->vocab - i;
        const int empty = masked && s->tops[b] == nothing;
        s->estimates[b] = empty ? 0.0 : s->passes->estimate(x + i, count, &powers) * powers.unit;
        total += s->estimates[b];
    }
    return total;
}

/* The token that `noise` (of 2^53) draws from all that x may have, or -1 if the estimates do not tell. */
static int64_t kf_draw_estimated(const kf_scratch *s, const float *x, double best, double scale, int masked,
                                 uint64_t noise)
{
    const double u = (double)noise * 0x1p-53, total = kf_estimate(s, x, best, scale, masked);
    if (total < 0.0)
        return -1;
    double before = 0.0;
    int64_t b = 0;
    for (; b + 1 < s->blocks && before + s->estimates[b] <= u * total; b++)
        before += s->estimates[b];
    const double rest = fmax(total - before - s->estimates[b], 0.0);
    const int64_t from = b * KF_BLOCK, count = from + KF_BLOCK < s->vocab ? KF_BLOCK : s->vocab - from;
    const int64_t *w = s->weights + from;
    int64_t sum;
    s->passes->weigh(x + from, count, best, scale, 0.0, s->weights + from, &sum);
    /* Where the draw is among the block's weights, give or take `off`: the last of it for the roundings here. */
    const double place = u * (rest + (double)sum) - (1.0 - u) * before;
    const double off = KF_ESTIMATE_OFF * (u * rest + (1.0 - u) * before) +
                       KF_TOKEN_OFF * (double)s->vocab + 0x1p-42 * total;
    if (!(place >= off && place + off < (double)sum))
        return -1;
    const int64_t first = (int64_t)(place - off), last = (int64_t)(place + off) + 1;
    int64_t i = 0, upto = w[0];
    for (; upto <= first; upto += w[i])
        i++;
    return last <= upto ? from + i : -1;
}

#endif
