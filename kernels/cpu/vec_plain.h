/* Sixteen float lanes in plain C: any processor, and the definition of what the others must compute.
 *
 * Every operation is one IEEE operation a lane (fma rounds once), sums fold halves (16 -> 8 -> 4 -> 2 -> 1),
 * max(a, b) is a > b ? a : b. So all give the same bits; tests/parity demands it. */
#define KF_ROUND 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to a whole number, which its low bits then are */
#define KF_ROUND_BITS 0x4338000000000000LL

#define NAME(x) x##_plain
#define TARGET
#define INL static inline __attribute__((always_inline))

typedef struct { float l[16]; } vf_plain;
typedef struct { uint32_t l[16]; } vp_plain; /* sixteen pairs of bfloat16, the first of a pair in the low half */
#define VF vf_plain
#define VP vp_plain
#define WIDE 0
#define UNROLL(n) /* lanes are loops already: unrolling makes half a minute of compilation and no speed */
#define LANES(expr)                  \
    VF r;                            \
    for (int i = 0; i < 16; i++)     \
        r.l[i] = (expr);             \
    return r

INL VF NAME(v_load)(const float *p) { LANES(p[i]); }
INL void NAME(v_store)(float *p, VF a) { memcpy(p, a.l, sizeof a.l); }
INL VF NAME(v_set1)(float x) { LANES(x); }
INL VF NAME(v_fma)(VF a, VF b, VF c) { LANES(fmaf(a.l[i], b.l[i], c.l[i])); }
INL VF NAME(v_mul)(VF a, VF b) { LANES(a.l[i] * b.l[i]); }
INL VF NAME(v_add)(VF a, VF b) { LANES(a.l[i] + b.l[i]); }
INL VF NAME(v_sub)(VF a, VF b) { LANES(a.l[i] - b.l[i]); }
INL VF NAME(v_div)(VF a, VF b) { LANES(a.l[i] / b.l[i]); }
INL VF NAME(v_max)(VF a, VF b) { LANES(a.l[i] > b.l[i] ? a.l[i] : b.l[i]); }
INL VF NAME(v_min)(VF a, VF b) { LANES(a.l[i] < b.l[i] ? a.l[i] : b.l[i]); }

INL uint32_t NAME(bits)(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INL float NAME(from_bits)(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INL float NAME(round16)(float x)
{
    uint32_t u = NAME(bits)(x);
    uint32_t r = x != x ? u | 0x00400000u : u + 0x7fffu + ((u >> 16) & 1u);
    return NAME(from_bits)(r & 0xffff0000u);
}

INL VF NAME(v_load16)(const uint16_t *p) { LANES(NAME(from_bits)((uint32_t)p[i] << 16)); }
/* Round to bfloat16, ties to even, kept as float. */
INL VF NAME(v_round16)(VF a) { LANES(NAME(round16)(a.l[i])); }
INL void NAME(v_store16)(uint16_t *p, VF a)
{
    for (int i = 0; i < 16; i++)
        p[i] = (uint16_t)(NAME(bits)(NAME(round16)(a.l[i])) >> 16);
}
INL VP NAME(v_pairs)(const uint16_t *p) { VP r; memcpy(&r, p, sizeof r); return r; }
INL VP NAME(v_pair1)(const uint16_t *p)
{
    VP r;
    memcpy(r.l, p, 4);
    for (int i = 1; i < 16; i++)
        r.l[i] = r.l[0];
    return r;
}
/* acc + the products of the pairs, the second ones first, rounded after each: AVX512_BF16 defines this order. */
INL VF NAME(v_dot2)(VP x, VP w, VF acc)
{
    for (int i = 0; i < 16; i++) {
        acc.l[i] = fmaf(NAME(from_bits)(x.l[i] & 0xffff0000u), NAME(from_bits)(w.l[i] & 0xffff0000u), acc.l[i]);
        acc.l[i] = fmaf(NAME(from_bits)(x.l[i] << 16), NAME(from_bits)(w.l[i] << 16), acc.l[i]);
    }
    return acc;
}
/* 2**n where t = n + 1.5 * 2**23 */
INL VF NAME(v_pow2)(VF t) { LANES(NAME(from_bits)((NAME(bits)(t.l[i]) - (0x4B400000u - 127u)) << 23)); }
/* x < lo ? 0 : y (a NaN in x keeps y) */
INL VF NAME(v_zero_below)(VF x, float lo, VF y) { LANES(x.l[i] < lo ? 0.0f : y.l[i]); }

INL float NAME(v_hsum)(VF a)
{
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a.l[i] += a.l[i + half];
    return a.l[0];
}

INL float NAME(v_hmax)(VF a)
{
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a.l[i] = a.l[i] > a.l[i + half] ? a.l[i] : a.l[i + half];
    return a.l[0];
}

/* sums[i] += x[i] in fixed point: rint(x * 2^32). One that is not below the limit makes the sum KF_BEYOND. */
INL void NAME(v_fixed_add)(int64_t *sums, VF x, float limit)
{
    for (int i = 0; i < 16; i++)
        sums[i] = fabsf(x.l[i]) < limit ? sums[i] + (int64_t)rint((double)x.l[i] * KF_FIXED_ONE) : KF_BEYOND;
}
/* Back, to float64 and then to float32; no number where the sum is beyond KF_FIXED_LIMIT. */
INL VF NAME(v_fixed)(const int64_t *sums)
{
    VF r;
    for (int i = 0; i < 16; i++) {
        r.l[i] = (float)((double)sums[i] * (1.0 / KF_FIXED_ONE));
        r.l[i] = fabsf(r.l[i]) < KF_FIXED_LIMIT ? r.l[i] : NAN;
    }
    return r;
}
#undef LANES
