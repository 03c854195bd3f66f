/* Passes over one row of logits, and which tokens min-p, top-k and top-p leave of it.
 *
 * A token's weight is an integer, exp((logit - best) / temperature) in units of 2^-44: sums of weights are exact,
 * so no order of summation, no vector width and no way of selecting can change a result. What is left of floating
 * point is one fixed chain of IEEE operations an element (no fused multiply-add, no libm), which every machine
 * rounds alike; passes.h may then be compiled for whatever vectors the processor has. */
#ifndef KF_WEIGHTS_H
#define KF_WEIGHTS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#define KF_ONE 44                    /* the best token weighs 2^44 */
#define KF_VOCAB_MAX ((1 << 19) - 1) /* so that the sum of all weights stays below 2^63 */
#define KF_BLOCK 1024                /* tokens of each partial sum; a draw looks into one block only */
#define KF_GROUP 16                  /* tokens of each partial maximum */
#define KF_CHAINS 8                  /* vectors of tokens that are weighed side by side */
#define KF_FLOAT_CHAINS 4            /* and in the estimate: with eight, registers of AVX2 go to memory and back */
#define KF_BUCKETS 2048
#define KF_LOG2E 1.4426950408889634

/* Adding these to a smaller number leaves its nearest integer in the low bits. */
#define KF_ROUND 0x1.8p52
#define KF_UNIT 0x1p52
#define KF_ROUND_FLOAT 0x1.8p23f

/* 2^(f + 44) by Taylor, highest power first: |f| <= 1/2, the first term left out is below 2^-47 of it. */
#define KF_TERMS 12
static const double kf_taylor[KF_TERMS] = {
    4.4455382718708116e-10 * 0x1p44, 7.054911620801123e-09 * 0x1p44,  1.01780860092397e-07 * 0x1p44,
    1.321548679014431e-06 * 0x1p44,  1.5252733804059841e-05 * 0x1p44, 1.540353039338161e-04 * 0x1p44,
    1.3333558146428443e-03 * 0x1p44, 9.618129107628477e-03 * 0x1p44,  5.550410866482158e-02 * 0x1p44,
    2.4022650695910072e-01 * 0x1p44, 6.931471805599453e-01 * 0x1p44,  0x1p44,
};

/* 2^f with the least largest error, 2^-28 for |f| <= 1/2, of coefficients that are floats. */
#define KF_FLOAT_TERMS 7
static const float kf_minimax[KF_FLOAT_TERMS] = {
    0x1.4172b6p-13f, 0x1.5f0976p-10f, 0x1.3b2ddap-7f, 0x1.c6af7ap-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.0f,
};

/* How the fast estimate has logits and temperature: see estimate.h. */
typedef struct {
    float scale, scale_rest; /* together log2(e) / temperature */
    float lowest;            /* logits below count as this one, which weighs 2^-64 of the best */
    float round;             /* KF_ROUND_FLOAT less the power of two that is taken out of all */
    double unit;             /* a weight of 1.0 in the estimate, in units of the exact ones */
} kf_powers;

/* The passes for one instruction set: see passes.h. `estimate` is NULL where there is none. */
typedef struct {
    int64_t (*best)(const float *x, int64_t n, int *finite, int32_t *tops);
    int64_t (*best_left)(const float *x, int64_t n, const int32_t *mask, float *out, int *finite, int32_t *tops,
                         int64_t *allowed);
    int64_t (*weigh)(const float *x, int64_t n, double best, double scale, double floor, int64_t *w, int64_t *sums);
    int64_t (*sum)(const float *x, int64_t n, double best, double scale, int64_t *sums);
    int64_t (*maxima)(const int64_t *w, int64_t n, int64_t *maxima);
    int64_t (*keep)(const int64_t *w, int64_t n, int64_t least, int32_t *kept);
    double (*estimate)(const float *x, int64_t n, const kf_powers *powers);
} kf_passes;

/* What one thread needs for one row. */
typedef struct {
    const kf_passes *passes;
    int64_t vocab, blocks, groups;
    int64_t *weights; /* [vocab] */
    int64_t *sums;    /* [blocks] weight of each block */
    double *estimates; /* [blocks] and what it is about */
    int64_t *maxima;  /* [groups] */
    int64_t *buckets; /* [KF_BUCKETS] */
    float *logits;    /* [vocab] of a row after its mask and penalties */
    int32_t *kept;    /* [vocab] tokens that may be drawn, ascending */
    int32_t *list;    /* [vocab] what kf_select still looks at */
    int32_t *tops;    /* [blocks] the largest logit of each block, as kf_order has it */
} kf_scratch;

/* `s` with its arrays in `memory`, or in none to find out how many bytes they are. */
static int64_t kf_scratch_place(kf_scratch *s, int64_t vocab, char *memory)
{
    int64_t used = 0;
    s->vocab = vocab;
    s->blocks = (vocab + KF_BLOCK - 1) / KF_BLOCK;
    s->groups = (vocab + KF_GROUP - 1) / KF_GROUP;
#define PLACE(field, count) \
    if (memory != NULL) \
        s->field = (void *)(memory + used); \
    used += ((count) * (int64_t)sizeof *s->field + 63) / 64 * 64;
    PLACE(weights, vocab)
    PLACE(sums, s->blocks)
    PLACE(estimates, s->blocks)
    PLACE(maxima, s->groups)
    PLACE(buckets, KF_BUCKETS)
    PLACE(logits, vocab)
    PLACE(kept, vocab)
    PLACE(list, vocab)
    PLACE(tops, s->blocks)
#undef PLACE
    return used;
}

static inline int64_t kf_bits(double x)
{
    int64_t i;
    memcpy(&i, &x, 8);
    return i;
}

/* Floats as integers of the same order; -0 becomes 0 first, which it equals. */
static inline int32_t kf_order(float x)
{
    int32_t i;
    x += 0.0f;
    memcpy(&i, &x, 4);
    return i ^ ((i >> 31) & 0x7fffffff);
}

/* ---- passes over a row, compiled for several instruction sets */

#if defined(__x86_64__) && defined(__GNUC__)
#define KF_X86 1
#define NAME(x) x##_plain
#define TARGET
#define KF_VECTOR 16
#define LOAD(p) _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(p))))
#define MAX(a, b) _mm_max_pd(a, _mm_set1_pd(b))
#define MAX_FLOATS(a, b) _mm_max_ps(a, b)
#define AT_LEAST(a, b) ((VI)_mm_cmpge_pd(a, _mm_set1_pd(b)))
#define KEEP(v) __asm__("" : "+x"(v))
#include "passes.h"
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define KF_VECTOR 32
#define LOAD(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define MAX(a, b) _mm256_max_pd(a, _mm256_set1_pd(b))
#define AT_LEAST(a, b) ((VI)_mm256_cmp_pd(a, _mm256_set1_pd(b), _CMP_GE_OQ))
#define LOAD_FLOATS(p) _mm256_loadu_ps(p)
#define FLOATS(a) _mm256_set1_ps(a)
#define MAX_FLOATS(a, b) _mm256_max_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOW(a) _mm256_cvtps_pd(_mm256_castps256_ps128(a))
#define HIGH(a) _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))
#define KEEP(v) __asm__("" : "+x"(v))
#include "passes.h"
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f")))
#define KF_VECTOR 64
#define LOAD(p) _mm512_cvtps_pd(_mm256_loadu_ps(p))
#define LOAD_FLOATS(p) _mm512_loadu_ps(p)
#define FLOATS(a) _mm512_set1_ps(a)
#define MAX_FLOATS(a, b) _mm512_max_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOW(a) _mm512_cvtps_pd(_mm512_castps512_ps256(a))
#define HIGH(a) _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)))
#define MAX(a, b) _mm512_max_pd(a, _mm512_set1_pd(b))
#define AT_LEAST(a, b) \
    ((VI)_mm512_maskz_set1_epi64(_mm512_cmp_pd_mask(a, _mm512_set1_pd(b), _CMP_GE_OQ), -1))
#define KEEP(v) __asm__("" : "+v"(v))
#include "passes.h"
#else
#define NAME(x) x##_plain
#define TARGET
#define KF_VECTOR 16
#define LOAD(p) ((VD){(p)[0], (p)[1]})
#define MAX(a, b) ((VD){(a)[0] > (b) ? (a)[0] : (b), (a)[1] > (b) ? (a)[1] : (b)})
#define MAX_FLOATS(a, b) ((VF)(((VW)(a) & ((a) > (b))) | ((VW)(b) & ~((a) > (b)))))
#define AT_LEAST(a, b) ((VI)((a) >= (b)))
#define KEEP(v)
#include "passes.h"
#endif

/* `isa` as kf_set_isa of kernels/cpu has it: 0 C, 1 AVX2, 2 and more AVX-512. */
static const kf_passes *kf_passes_for(int isa)
{
#ifdef KF_X86
    if (isa >= 2)
        return &kf_passes_avx512;
    if (isa == 1)
        return &kf_passes_avx2;
#endif
    (void)isa;
    return &kf_passes_plain;
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
    const int64_t groups = s->passes->maxima(s->weights, s->vocab, s->maxima);
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

#define KF_SAMPLE 64 /* of each block, in the guess below */

/* A heavier floor, guessed from a part of each block: about half of what top-p leaves out weighs less. It may be too heavy:
 * then those that reach it do not bring top-p together. */
static int64_t kf_top_p_guess(const kf_scratch *s, double top_p, int64_t total, int64_t least)
{
    int64_t count = 0, sum = 0;
    for (int64_t b = 0; b + KF_SAMPLE <= s->vocab; b += KF_BLOCK)
        for (int64_t i = b; i < b + KF_SAMPLE; i++) {
            const int64_t weight = s->weights[i];
            s->list[count] = (int32_t)i;
            count += weight >= least;
            sum += weight & -(int64_t)(weight >= least);
        }
    const double light = (1.0 - top_p) * (double)total * KF_SAMPLE / (2.0 * KF_BLOCK);
    if (light >= (double)sum)
        return least;
    return kf_select(s->weights, s->list, count, sum - (int64_t)light, 1, s->buckets).weight;
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

/* What is to be reached of a total. */
static int64_t kf_top_p_target(double top_p, int64_t total)
{
    const double wanted = ceil(top_p * (double)total);
    return wanted < 1.0 ? 1 : wanted < (double)total ? (int64_t)wanted : total;
}

/* Tokens among which are all that top-p wants of the whole vocabulary: to s->kept, ascending. */
static int64_t kf_top_p_keep(const kf_scratch *s, double top_p, int64_t total)
{
    const int64_t least = kf_top_p_floor(s, top_p, total), guess = kf_top_p_guess(s, top_p, total, least);
    if (guess > least) {
        const int64_t count = s->passes->keep(s->weights, s->vocab, guess, s->kept);
        int64_t sum = 0;
        for (int64_t i = 0; i < count; i++)
            sum += s->weights[s->kept[i]];
        if (sum >= kf_top_p_target(top_p, total))
            return count;
    }
    return s->passes->keep(s->weights, s->vocab, least, s->kept);
}

/* The fewest of the heaviest whose share of *total reaches top_p, at least one; of equals the first. */
static int64_t kf_top_p(const kf_scratch *s, int64_t count, double top_p, int64_t *total)
{
    const int64_t target = kf_top_p_target(top_p, *total);
    memcpy(s->list, s->kept, (size_t)count * sizeof(int32_t));
    return kf_apply(s, count, kf_select(s->weights, s->list, count, target, 1, s->buckets), total);
}

/* ---- the largest logits */

typedef struct {
    int32_t token;
    float logit;
} kf_top;

static int kf_before(const void *a, const void *b)
{
    const kf_top *p = a, *q = b;
    if (p->logit != q->logit)
        return p->logit > q->logit ? -1 : 1;
    return p->token < q->token ? -1 : 1;
}

/* The `count` largest of the finite x[vocab], largest first, equal ones by token: to top[0 .. count). Expects tops, and
 * 1 <= count <= vocab. Few are sought in the blocks that have one of them, many as the heaviest are. */
static void kf_largest(const kf_scratch *s, const float *x, int64_t count, kf_top *top)
{
    int64_t found = 0;
    if (count <= s->blocks) {
        for (int64_t b = 0; b < s->blocks; b++) {
            s->list[b] = (int32_t)b;
            s->sums[b] = (int64_t)s->tops[b] - INT32_MIN + 1;
        }
        /* So many blocks have one that is as large: the count-th largest is no smaller. */
        const int64_t least = kf_select(s->sums, s->list, s->blocks, count, 0, s->buckets).weight + INT32_MIN - 1;
        for (int64_t b = 0; b < s->blocks; b++) {
            const int64_t end = (b + 1) * KF_BLOCK < s->vocab ? (b + 1) * KF_BLOCK : s->vocab;
            for (int64_t i = b * KF_BLOCK; s->tops[b] >= least && i < end; i++) {
                s->kept[found] = (int32_t)i;
                found += kf_order(x[i]) >= least;
            }
        }
    } else {
        for (; found < s->vocab; found++)
            s->kept[found] = (int32_t)found;
    }
    int64_t total;
    for (int64_t i = 0; i < found; i++)
        s->weights[s->kept[i]] = (int64_t)kf_order(x[s->kept[i]]) - INT32_MIN + 1;
    memcpy(s->list, s->kept, (size_t)found * sizeof(int32_t));
    kf_cut cut = kf_select(s->weights, s->list, found, count, 0, s->buckets);
    cut.rest *= cut.weight; /* of so many tokens of this weight */
    found = kf_apply(s, found, cut, &total);
    for (int64_t i = 0; i < found; i++)
        top[i] = (kf_top){s->kept[i], x[s->kept[i]]};
    qsort(top, (size_t)found, sizeof *top, kf_before);
}

#endif
