/* Passes over one row of logits, for one instruction set: included once for each by weights.h, which defines NAME,
 * TARGET, KF_VECTOR (bytes of a vector), LOAD, MAX, AT_LEAST and KEEP.
 *
 * Written with vectors where the compiler found none: gcc 12 leaves the loop of `weigh` scalar for AVX2, 0.85 ms a row of
 * 128,256 tokens instead of 0.12. KF_CHAINS vectors go through the polynomial side by side, since one has to wait for
 * each product; KEEP stops the compiler from ordering them one after the other again. */
typedef double NAME(kf_vd) __attribute__((vector_size(KF_VECTOR)));
typedef int64_t NAME(kf_vi) __attribute__((vector_size(KF_VECTOR)));
typedef float NAME(kf_vf) __attribute__((vector_size(KF_VECTOR)));
typedef int32_t NAME(kf_vw) __attribute__((vector_size(KF_VECTOR)));
typedef uint32_t NAME(kf_vu) __attribute__((vector_size(KF_VECTOR)));
#define VD NAME(kf_vd)
#define VI NAME(kf_vi)
#define VF NAME(kf_vf)
#define VW NAME(kf_vw)
#define VU NAME(kf_vu)
#define LANES (KF_VECTOR / 8)
#define SPAN (LANES * KF_CHAINS) /* tokens at a time; divides KF_BLOCK */
#define EACH(k) _Pragma("GCC unroll 8") for (int k = 0; k < KF_CHAINS; k++)

/* The first of the largest values (as numpy.argmax), and whether all are finite; tops: the largest of each block, as
 * kf_order has it. */
TARGET static int64_t NAME(kf_best)(const float *x, int64_t n, int *finite, int32_t *tops)
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
        tops[b / KF_BLOCK] = top;
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

/* Weights of SPAN tokens, added to `sums`, and stored at w unless it is NULL. `floor`: whether light ones are 0. */
TARGET static inline __attribute__((always_inline)) void
NAME(kf_weigh_span)(const float *x, double best, double scale, double least, int floor, int64_t *w, VI *sums)
{
    VD f[KF_CHAINS], p[KF_CHAINS];
    VI whole[KF_CHAINS];
    EACH(k)
    {
        VD y = (LOAD(x + k * LANES) - best) * scale;
        y = MAX(y, -64.0); /* these weigh nothing; takes NaN (-inf times 0) as well */
        const VD rounded = y + KF_ROUND;
        whole[k] = (VI)rounded;
        f[k] = y - (rounded - KF_ROUND);
        p[k] = f[k] * kf_taylor[0];
    }
    _Pragma("GCC unroll 16") for (int term = 1; term < KF_TERMS - 1; term++) EACH(k)
    {
        p[k] = (p[k] + kf_taylor[term]) * f[k];
        KEEP(p[k]);
    }
    EACH(k)
    {
        const VD weight = (VD)((VI)(p[k] + kf_taylor[KF_TERMS - 1]) + (whole[k] << 52)) + KF_UNIT;
        VI bits = (VI)weight - 0x4330000000000000;
        if (floor)
            bits &= AT_LEAST(weight, least);
        if (w != NULL)
            memcpy(w + k * LANES, &bits, sizeof bits);
        sums[k] += bits;
    }
}

TARGET static inline __attribute__((always_inline)) int64_t
NAME(kf_weigh_all)(const float *x, int64_t n, double best, double scale, double least, int floor, int64_t *w,
                   int64_t *sums)
{
    int64_t total = 0;
    for (int64_t b = 0; b < n; b += KF_BLOCK) {
        const int64_t end = b + KF_BLOCK < n ? b + KF_BLOCK : n;
        VI acc[KF_CHAINS] = {{0}};
        int64_t i = b;
        for (; i + SPAN <= end; i += SPAN)
            NAME(kf_weigh_span)(x + i, best, scale, least, floor, w == NULL ? NULL : w + i, acc);
        if (i < end) { /* the rest of the row, and what weighs nothing behind it */
            float tail[SPAN];
            int64_t weights[SPAN];
            for (int64_t j = 0; j < SPAN; j++)
                tail[j] = i + j < end ? x[i + j] : -INFINITY;
            NAME(kf_weigh_span)(tail, best, scale, least, floor, weights, acc);
            if (w != NULL)
                memcpy(w + i, weights, (size_t)(end - i) * sizeof *w);
        }
        int64_t sum = 0;
        for (int k = 0; k < KF_CHAINS; k++)
            for (int lane = 0; lane < LANES; lane++)
                sum += acc[k][lane];
        sums[b / KF_BLOCK] = sum;
        total += sum;
    }
    return total;
}

/* Weights of all tokens, 0 for those below `floor`; returns their sum. `scale` is log2(e) / temperature. */
TARGET static int64_t NAME(kf_weigh)(const float *x, int64_t n, double best, double scale, double floor, int64_t *w,
                                     int64_t *sums)
{
    return NAME(kf_weigh_all)(x, n, best, scale, KF_UNIT + floor, 1, w, sums);
}

/* The same sums without a floor, and without the weights: they take more room than a second level cache may have. */
TARGET static int64_t NAME(kf_sum)(const float *x, int64_t n, double best, double scale, int64_t *sums)
{
    return NAME(kf_weigh_all)(x, n, best, scale, 0.0, 0, NULL, sums);
}

/* The heaviest weight of each KF_GROUP tokens. Returns how many groups there are. */
TARGET static int64_t NAME(kf_maxima)(const int64_t *w, int64_t n, int64_t *maxima)
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
TARGET static int64_t NAME(kf_keep)(const int64_t *w, int64_t n, int64_t least, int32_t *kept)
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

#define WORD_PARTS (32 / (KF_VECTOR / 4)) /* vectors of the 32 tokens of a mask's word */

/* The logits of a word's tokens whose bit is set, minus infinity for all others: to `out`, and the largest to `top`. `wrong` is
 * NaN where a logit is not finite, else 0. */
TARGET static inline __attribute__((always_inline)) void
NAME(kf_leave)(const float *x, uint32_t bits, float *out, VF *top, VF *wrong)
{
    _Pragma("GCC unroll 8") for (int k = 0; k < WORD_PARTS; k++)
    {
        VW lanes, logits;
        VF v;
        _Pragma("GCC unroll 16") for (int lane = 0; lane < KF_VECTOR / 4; lane++)
            lanes[lane] = 31 - lane - k * (KF_VECTOR / 4);
        const VW set = (((VW){0} + (int32_t)bits) << lanes) >> 31;
        memcpy(&v, x + k * (KF_VECTOR / 4), sizeof v);
        wrong[k] += v * 0.0f;
        logits = ((VW)v & set) | ((VW)((VF){0} - INFINITY) & ~set);
        memcpy(out + k * (KF_VECTOR / 4), &logits, sizeof logits);
        top[k] = MAX_FLOATS((VF)logits, top[k]);
    }
}

/* kf_best of what a mask leaves, which goes to `out`, with minus infinity for all other tokens; `finite` is of all logits,
 * `allowed` how many the mask leaves. One pass instead of three: two rows are more than a second level cache has. */
TARGET static int64_t NAME(kf_best_left)(const float *x, int64_t n, const int32_t *mask, float *out, int *finite,
                                         int32_t *tops, int64_t *allowed)
{
    int32_t best = INT32_MIN;
    int64_t from = 0, set = 0;
    *finite = 1;
    for (int64_t b = 0; b < n; b += KF_BLOCK) {
        const int64_t end = b + KF_BLOCK < n ? b + KF_BLOCK : n;
        VF top[WORD_PARTS], wrong[WORD_PARTS] = {{0}};
        for (int k = 0; k < WORD_PARTS; k++)
            top[k] = (VF){0} - INFINITY;
        int64_t i = b;
        for (; i + 32 <= end; i += 32) {
            const uint32_t bits = (uint32_t)mask[i / 32];
            set += __builtin_popcount(bits);
            NAME(kf_leave)(x + i, bits, out + i, top, wrong);
        }
        if (i < end) { /* a word that has more bits than there are tokens */
            float tail[32] = {0}, left[32];
            const uint32_t bits = (uint32_t)mask[i / 32] & ((1u << (end - i)) - 1);
            set += __builtin_popcount(bits);
            memcpy(tail, x + i, (size_t)(end - i) * sizeof *x);
            NAME(kf_leave)(tail, bits, left, top, wrong);
            memcpy(out + i, left, (size_t)(end - i) * sizeof *x);
        }
        float most = -INFINITY;
        for (int k = 0; k < WORD_PARTS; k++)
            for (int lane = 0; lane < KF_VECTOR / 4; lane++) {
                most = top[k][lane] > most ? top[k][lane] : most;
                *finite &= wrong[k][lane] == 0.0f;
            }
        tops[b / KF_BLOCK] = kf_order(most);
        if (tops[b / KF_BLOCK] > best) {
            best = tops[b / KF_BLOCK];
            from = b;
        }
    }
    *allowed = set;
    while (*finite && kf_order(out[from]) != best)
        from++;
    return from;
}
#undef WORD_PARTS

#ifdef FMA
#define FLOATS_SPAN (2 * LANES * KF_FLOAT_CHAINS)
#define EACH_FLOATS(k) _Pragma("GCC unroll 8") for (int k = 0; k < KF_FLOAT_CHAINS; k++)

/* 2^(x * scale) of FLOATS_SPAN tokens, to `sums`. */
TARGET static inline __attribute__((always_inline)) void
NAME(kf_estimate_span)(const float *x, const kf_powers *powers, VD *sums)
{
    VF f[KF_FLOAT_CHAINS], p[KF_FLOAT_CHAINS];
    VU whole[KF_FLOAT_CHAINS];
    EACH_FLOATS(k)
    {
        const VF v = MAX_FLOATS(LOAD_FLOATS(x + k * 2 * LANES), FLOATS(powers->lowest)); /* takes NaN as well */
        const VF rounded = FMA(v, FLOATS(powers->scale), FLOATS(powers->round));
        whole[k] = (VU)rounded << 23;
        f[k] = FMA(v, FLOATS(powers->scale), -(rounded - powers->round));
        f[k] = FMA(v, FLOATS(powers->scale_rest), f[k]);
        p[k] = FLOATS(kf_minimax[0]);
    }
    _Pragma("GCC unroll 16") for (int term = 1; term < KF_FLOAT_TERMS; term++) EACH_FLOATS(k)
    {
        p[k] = FMA(p[k], f[k], FLOATS(kf_minimax[term]));
        KEEP(p[k]);
    }
    EACH_FLOATS(k) p[k] = (VF)((VU)p[k] + whole[k]);
    for (int step = 1; step < KF_FLOAT_CHAINS; step *= 2) /* two additions deep: see KF_ESTIMATE_OFF */
        _Pragma("GCC unroll 8") for (int k = 0; k < KF_FLOAT_CHAINS; k += 2 * step) p[k] += p[k + step];
    sums[0] += LOW(p[0]);
    sums[1] += HIGH(p[0]);
}

/* About what the tokens of a block weigh together: see estimate.h. */
TARGET static double NAME(kf_estimate)(const float *x, int64_t n, const kf_powers *powers)
{
    VD sums[2] = {{0}};
    int64_t i = 0;
    for (; i + FLOATS_SPAN <= n; i += FLOATS_SPAN)
        NAME(kf_estimate_span)(x + i, powers, sums);
    if (i < n) {
        float tail[FLOATS_SPAN];
        for (int64_t j = 0; j < FLOATS_SPAN; j++)
            tail[j] = i + j < n ? x[i + j] : -INFINITY;
        NAME(kf_estimate_span)(tail, powers, sums);
    }
    double sum = 0.0;
    for (int lane = 0; lane < LANES; lane++)
        sum += sums[0][lane] + sums[1][lane];
    return sum;
}
#undef FLOATS_SPAN
#undef EACH_FLOATS
#undef LOAD_FLOATS
#undef FLOATS
#undef FMA
#undef LOW
#undef HIGH
#define ESTIMATE NAME(kf_estimate)
#else
#define ESTIMATE NULL
#endif

static const kf_passes NAME(kf_passes) = {
    NAME(kf_best), NAME(kf_best_left), NAME(kf_weigh), NAME(kf_sum), NAME(kf_maxima), NAME(kf_keep), ESTIMATE,
};
#undef ESTIMATE
#undef VD
#undef VI
#undef VF
#undef VW
#undef VU
#undef LANES
#undef SPAN
#undef EACH
#undef NAME
#undef TARGET
#undef KF_VECTOR
#undef LOAD
#undef MAX
#undef MAX_FLOATS
#undef AT_LEAST
#undef KEEP
