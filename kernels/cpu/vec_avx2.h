/* Sixteen float lanes in two AVX registers. The contract of the operations is in vec_plain.h. */
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define INL static inline __attribute__((always_inline)) TARGET

typedef struct { __m256 lo, hi; } vf_avx2;
typedef struct { __m256i lo, hi; } vp_avx2;
#define VF vf_avx2
#define VP vp_avx2
#define WIDE 0
#define UNROLL(n) KF_PRAGMA(GCC unroll n)
#define BOTH(op, a, b) ((VF){op((a).lo, (b).lo), op((a).hi, (b).hi)})

INL VF NAME(v_load)(const float *p) { return (VF){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INL void NAME(v_store)(float *p, VF a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
INL VF NAME(v_set1)(float x) { return (VF){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INL VF NAME(v_fma)(VF a, VF b, VF c)
{
    return (VF){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INL VF NAME(v_mul)(VF a, VF b) { return BOTH(_mm256_mul_ps, a, b); }
INL VF NAME(v_add)(VF a, VF b) { return BOTH(_mm256_add_ps, a, b); }
INL VF NAME(v_sub)(VF a, VF b) { return BOTH(_mm256_sub_ps, a, b); }
INL VF NAME(v_div)(VF a, VF b) { return BOTH(_mm256_div_ps, a, b); }
INL VF NAME(v_max)(VF a, VF b) { return BOTH(_mm256_max_ps, a, b); }
INL VF NAME(v_min)(VF a, VF b) { return BOTH(_mm256_min_ps, a, b); }

INL __m256 NAME(widen16)(const uint16_t *p)
{
    __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}
INL VF NAME(v_load16)(const uint16_t *p) { return (VF){NAME(widen16)(p), NAME(widen16)(p + 8)}; }

INL __m256 NAME(round16)(__m256 a)
{
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(u, _mm256_set1_epi32(0x00400000)));
    __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    r = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(r), quiet, nan));
    return _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32((int)0xffff0000u)));
}
INL VF NAME(v_round16)(VF a) { return (VF){NAME(round16)(a.lo), NAME(round16)(a.hi)}; }

INL void NAME(v_store16)(uint16_t *p, VF a)
{
    VF r = NAME(v_round16)(a);
    __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(r.lo), 16);
    __m256i hi = _mm256_srli_epi32(_mm256_castps_si256(r.hi), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
    _mm256_storeu_si256((__m256i *)p, packed);
}

INL VP NAME(v_pairs)(const uint16_t *p)
{
    return (VP){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 16))};
}
INL VP NAME(v_pair1)(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, 4);
    return (VP){_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
INL __m256 NAME(dot2)(__m256i x, __m256i w, __m256 acc)
{
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)),
                          _mm256_castsi256_ps(_mm256_and_si256(w, high)), acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                           _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), acc);
}
INL VF NAME(v_dot2)(VP x, VP w, VF acc)
{
    return (VF){NAME(dot2)(x.lo, w.lo, acc.lo), NAME(dot2)(x.hi, w.hi, acc.hi)};
}

INL __m256 NAME(pow2)(__m256 t)
{
    __m256i n = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(0x4B400000 - 127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}
INL VF NAME(v_pow2)(VF t) { return (VF){NAME(pow2)(t.lo), NAME(pow2)(t.hi)}; }

INL VF NAME(v_zero_below)(VF x, float lo, VF y)
{
    __m256 l = _mm256_set1_ps(lo);
    return (VF){_mm256_andnot_ps(_mm256_cmp_ps(x.lo, l, _CMP_LT_OQ), y.lo),
                _mm256_andnot_ps(_mm256_cmp_ps(x.hi, l, _CMP_LT_OQ), y.hi)};
}

INL float NAME(v_hsum)(VF a)
{
    __m256 s = _mm256_add_ps(a.lo, a.hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

INL float NAME(v_hmax)(VF a)
{
    __m256 s = _mm256_max_ps(a.lo, a.hi);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

/* AVX2 has no conversion between float64 and 64-bit integers: see kernels/ranks/sums.c, which does the same. */
INL void NAME(fixed_add4)(int64_t *sums, __m128 x)
{
    const __m256d wide = _mm256_cvtps_pd(x);
    const __m128i whole = _mm256_cvttpd_epi32(wide);
    const __m256d rest = _mm256_mul_pd(_mm256_sub_pd(wide, _mm256_cvtepi32_pd(whole)), _mm256_set1_pd(KF_FIXED_ONE));
    const __m256i low = _mm256_sub_epi64(_mm256_castpd_si256(_mm256_add_pd(rest, _mm256_set1_pd(KF_ROUND))),
                                         _mm256_set1_epi64x(KF_ROUND_BITS));
    const __m256i high = _mm256_slli_epi64(_mm256_cvtepi32_epi64(whole), 32);
    __m256i *at = (__m256i *)sums;
    _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), _mm256_add_epi64(high, low)));
}
INL void NAME(v_fixed_add)(int64_t *sums, VF x, float limit)
{
    const __m256 bound = _mm256_set1_ps(limit), sign = _mm256_set1_ps(-0.0f);
    const __m256 within = _mm256_and_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, x.lo), bound, _CMP_LT_OQ),
                                        _mm256_cmp_ps(_mm256_andnot_ps(sign, x.hi), bound, _CMP_LT_OQ));
    if (__builtin_expect(_mm256_movemask_ps(within) != 255, 0)) {
        vf_plain one_by_one;
        memcpy(&one_by_one, &x, sizeof x);
        v_fixed_add_plain(sums, one_by_one, limit);
        return;
    }
    NAME(fixed_add4)(sums, _mm256_castps256_ps128(x.lo));
    NAME(fixed_add4)(sums + 4, _mm256_extractf128_ps(x.lo, 1));
    NAME(fixed_add4)(sums + 8, _mm256_castps256_ps128(x.hi));
    NAME(fixed_add4)(sums + 12, _mm256_extractf128_ps(x.hi, 1));
}

INL __m128 NAME(fixed4)(const int64_t *sums)
{
    const __m256i order = _mm256_setr_epi32(1, 3, 5, 7, 0, 2, 4, 6);
    const __m256d offset = _mm256_set1_pd(4503599627370496.0); /* 2^52: has a 32-bit number in its low bits */
    const __m256i halves = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)sums), order);
    const __m256d high = _mm256_mul_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(halves)), _mm256_set1_pd(KF_FIXED_ONE));
    const __m256i low = _mm256_cvtepu32_epi64(_mm256_extracti128_si256(halves, 1));
    const __m256d low_wide =
        _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(low, _mm256_castpd_si256(offset))), offset);
    return _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_add_pd(high, low_wide), _mm256_set1_pd(1.0 / KF_FIXED_ONE)));
}
INL __m256 NAME(fixed8)(const int64_t *sums)
{
    const __m256 x = _mm256_set_m128(NAME(fixed4)(sums + 4), NAME(fixed4)(sums));
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    return _mm256_blendv_ps(_mm256_set1_ps(NAN), x, _mm256_cmp_ps(size, _mm256_set1_ps(KF_FIXED_LIMIT), _CMP_LT_OQ));
}
INL VF NAME(v_fixed)(const int64_t *sums) { return (VF){NAME(fixed8)(sums), NAME(fixed8)(sums + 8)}; }
#undef BOTH
