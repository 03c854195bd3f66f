/* Passes over one row of logits, and which tokens min-p, top-k and top-p leave of it.
 *
 * A token's weight is an integer, exp((logit - best) / temperature) in units of 2^-44: sums of weights are exact,
 * so no order of summation, no vector width and no way of selecting can change a result. What is left of floating
 * point is one fixed chain of IEEE operations an element (no fused multiply-add, no libm), which every machine
 * rounds alike; the loops may then be compiled for whatever vectors the processor has. */
#ifndef KF_WEIGHTS_H
#define KF_WEIGHTS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define KF_ONE 44                    /* the best token weighs 2^44 */
#define KF_VOCAB_MAX ((1 << 19) - 1) /* so that the sum of all weights stays below 2^63 */
#define KF_BLOCK 1024                /* tokens of each partial sum; a draw looks into one block only */
#define KF_GROUP 16                  /* tokens of each partial maximum */
#define KF_BUCKETS 2048
#define KF_LOG2E 1.4426950408889634

/* Compiled for several instruction sets, chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define KF_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KF_CLONES
#endif

typedef struct {
    int64_t vocab;
    float *logits;     /* [vocab] of a row after penalties */
    int64_t *weights;  /* [vocab] */
    int64_t *sums;     /* [vocab / KF_BLOCK + 1] weight of each block */
    int32_t *kept;     /* [vocab] tokens that may be drawn, ascending */
    int32_t *list;     /* [vocab] what kf_select still looks at */
    int64_t *maxima;   /* [vocab / KF_GROUP + 1] */
    int64_t *buckets;  /* [KF_BUCKETS] */
} kf_scratch;

static inline int64_t kf_bits(double x)
{
    int64_t i;
    memcpy(&i, &x, 8);
    return i;
}

static inline double kf_double(int64_t i)
{
    double x;
    memcpy(&x, &i, 8);
    return x;
}

/* ---- passes over a row */

/* Floats as integers of the same order; -0 becomes 0 first, which it equals. */
static inline int32_t kf_order(float x)
{
    int32_t i;
    x += 0.0f;
    memcpy(&i, &x, 4);
    return i ^ ((i >> 31) & 0x7fffffff);
}

/* The first of the largest values (as numpy.argmax), and whether all are finite. */
KF_CLONES static int64_t kf_best(const float *x, int64_t n, int *finite)
{
    int32_t best = INT32_MIN, largest = 0;
    int64_t from = 0;
    for (int64_t b = 0; b < n; b += KF_BLOCK) {
        const int64_t end = b + KF_BLOCK < n ? b + KF_BLOCK : n;
        int32_t top = INT32_MIN;
        for (int64_t i = b; i < end; i++) {
            int32_t magnitude;
            memcpy(&magnitude, x + i, 4);
            magnitude &= 0x7fffffff;
            const int32_t order = kf_order(x[i]);
            largest = magnitude > largest ? magnitude : largest;
            top = order > top ? order : top;
        }
        if (top > best) {
            best = top;
            from = b;
        }
    }
    *finite = largest < 0x7f800000;
    while (kf_order(x[from]) != best)
        from++;
    return from;
}

/* Weights of all tokens, 0 for those below `floor`; returns their sum. `scale` is log2(e) / temperature. */
KF_CLONES static int64_t kf_weigh(const float *x, int64_t n, double best, double scale, double floor, int64_t *w,
                                  int64_t *sums)
{
    /* Adding these to a smaller number leaves its nearest integer in the low bits. */
    const double round = 0x1.8p52, unit = 0x1p52, least = unit + floor;
    int64_t total = 0;
    for (int64_t b = 0; b < n; b += KF_BLOCK) {
        const int64_t end = b + KF_BLOCK < n ? b + KF_BLOCK : n;
        int64_t sum = 0;
        for (int64_t i = b; i < end; i++) {
            double y = ((double)x[i] - best) * scale;
            y = y > -64.0 ? y : -64.0; /* these weigh nothing; takes NaN (-inf times 0) as well */
            const double whole = y + round, f = y - (whole - round);
            /* 2^f by Taylor: |f| <= 1/2, the first term left out is below 2^-47 */
            double p = 4.4455382718708116e-10;
            p = p * f + 7.054911620801123e-09;
            p = p * f + 1.01780860092397e-07;
            p = p * f + 1.321548679014431e-06;
            p = p * f + 1.5252733804059841e-05;
            p = p * f + 1.540353039338161e-04;
            p = p * f + 1.3333558146428443e-03;
            p = p * f + 9.618129107628477e-03;
            p = p * f + 5.550410866482158e-02;
            p = p * f + 2.4022650695910072e-01;
            p = p * f + 6.931471805599453e-01;
            p = p * f + 1.0;
            const uint64_t exponent = ((uint64_t)kf_bits(whole) + KF_ONE) << 52;
            const double weight = kf_double((int64_t)((uint64_t)kf_bits(p) + exponent)) + unit;
            w[i] = weight >= least ? kf_bits(weight) - 0x4330000000000000 : 0;
            sum += w[i];
        }
        sums[b / KF_BLOCK] = sum;
        total += sum;
    }
    return total;
}

/* The heaviest weight of each KF_GROUP tokens. Returns how many groups there are. */
KF_CLONES static int64_t kf_maxima(const int64_t *w, int64_t n, int64_t *maxima)
{
    int64_t groups = 0;
    for (int64_t i = 0; i < n; i += KF_GROUP) {
        const int64_t end = i + KF_GROUP < n ? i + KF_GROUP : n;
        int64_t top = 0;
        for (int64_t j = i; j < end; j++)
            top = w[j] > top ? w[j] : top;
        maxima[groups++] = top;
    }
    return groups;
}

/* The tokens that weigh at least `least` (> 0), ascending; most groups have none. */
KF_CLONES static int64_t kf_keep(const int64_t *w, int64_t n, int64_t least, int32_t *kept)
{
    int64_t count = 0, i = 0;
    for (; i + KF_GROUP <= n; i += KF_GROUP) {
        int64_t any = 0;
        for (int j = 0; j < KF_GROUP; j++)
            any |= least - 1 - w[i + j];
        if (any < 0)
            for (int j = 0; j < KF_GROUP; j++) {
                kept[count] = (int32_t)(i + j);
                count += w[i + j] >= least;
            }
    }
    for (; i < n; i++) {
        kept[count] = (int32_t)i;
        count += w[i] >= least;
    }
    return count;
}

/* ---- selection */

typedef struct {
    int64_t weight; /* the smallest that is wanted */
    int64_t rest;   /* how much of the target those of just this weight must bring */
} kf_cut;

/* Where the heaviest of w[list[0 .. count)] reach `target` together, each counting 1 or its weight: buckets of
 * equal ratio, then the bucket in question again, until it holds one weight only. Spends the list. Expects
 * 1 <= target <= their sum. */
static kf_cut kf_select(const int64_t *w, int32_t *list, int64_t count, int64_t target, int by_weight,
                        int64_t *buckets)
{
    for (;;) {
        int64_t lo = INT64_MAX, hi = 0;
        for (int64_t i = 0; i < count; i++) {
            const int64_t weight = w[list[i]];
            lo = weight < lo ? weight : lo;
            hi = weight > hi ? weight : hi;
        }
        if (lo == hi)
            return (kf_cut){lo, target};
        lo = kf_bits((double)lo);
        hi = kf_bits((double)hi);
        int shift = 0;
        while ((hi - lo) >> shift >= KF_BUCKETS)
            shift++;
        memset(buckets, 0, KF_BUCKETS * sizeof(int64_t));
        for (int64_t i = 0; i < count; i++) {
            const int64_t weight = w[list[i]];
            buckets[(kf_bits((double)weight) - lo) >> shift] += by_weight ? weight : 1;
        }
        int64_t bucket = (hi - lo) >> shift;
        for (; bucket > 0 && buckets[bucket] < target; bucket--)
            target -= buckets[bucket];
        int64_t left = 0;
        for (int64_t i = 0; i < count; i++) {
            const int32_t token = list[i];
            list[left] = token;
            left += (kf_bits((double)w[token]) - lo) >> shift == bucket;
        }
        count = left;
    }
}

/* A weight that the top_k heaviest tokens reach: the top_k-th of the groups' heaviest does, if there are so many. */
static int64_t kf_top_k_floor(const kf_scratch *s, int64_t top_k)
{
    const int64_t groups = kf_maxima(s->weights, s->vocab, s->maxima);
    if (top_k > groups / 2)
        return 1;
    for (int64_t g = 0; g < groups; g++)
        s->list[g] = (int32_t)g;
    const int64_t weight = kf_select(s->maxima, s->list, groups, top_k, 0, s->buckets).weight;
    return weight > 1 ? weight : 1;
}

/* A weight so light that all lighter tokens together are less than top-p leaves out: none of them is wanted. */
static int64_t kf_top_p_floor(const kf_scratch *s, double top_p, int64_t total)
{
    const double light = (1.0 - top_p) * (double)total / (double)(2 * s->vocab);
    return light > 1.0 ? (int64_t)light : 1;
}

/* Keeps what is heavier than the cut, and of those as heavy as it the first, until they bring `rest`. */
static int64_t kf_apply(const kf_scratch *s, int64_t count, kf_cut cut, int64_t *total)
{
    int64_t left = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) { /* without branches: nothing about the order can be foreseen */
        const int32_t token = s->kept[i];
        const int64_t weight = s->weights[token];
        const int64_t equal = weight == cut.weight, stays = (weight > cut.weight) | (equal & (cut.rest > 0));
        s->kept[left] = token;
        left += stays;
        sum += weight & -stays;
        cut.rest -= weight & -equal;
    }
    *total = sum;
    return left;
}

/* The top_k heaviest, and all that weigh as much as the last of them. */
static int64_t kf_top_k(const kf_scratch *s, int64_t count, int64_t top_k, int64_t *total)
{
    if (top_k > count)
        return count; /* then the floor was 1 and *total is theirs */
    memcpy(s->list, s->kept, (size_t)count * sizeof(int32_t));
    kf_cut cut = kf_select(s->weights, s->list, count, top_k, 0, s->buckets);
    cut.rest = INT64_MAX;
    return kf_apply(s, count, cut, total);
}

/* The fewest of the heaviest whose share of *total reaches top_p, at least one; of equals the first. */
static int64_t kf_top_p(const kf_scratch *s, int64_t count, double top_p, int64_t *total)
{
    const double wanted = ceil(top_p * (double)*total);
    const int64_t target = wanted < 1.0 ? 1 : wanted < (double)*total ? (int64_t)wanted : *total;
    memcpy(s->list, s->kept, (size_t)count * sizeof(int32_t));
    return kf_apply(s, count, kf_select(s->weights, s->list, count, target, 1, s->buckets), total);
}

#endif
