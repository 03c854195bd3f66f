/* Sixteen float lanes in one AVX-512 register. The contract of the operations is in vec_plain.h.
 * Included twice: KF_DOT_BF16 says that the processor multiplies pairs of bfloat16 itself. */
#if KF_DOT_BF16
#define NAME(x) x##_avx512bf16
#define TARGET __attribute__((target("avx512f,avx512bf16,avx512bw,avx512vl,avx2,fma")))
#else
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#endif
#define INL static inline __attribute__((always_inline)) TARGET

#define VF __m512
#define VP __m512i
#define WIDE 1
#define UNROLL(n) KF_PRAGMA(GCC unroll n)

INL VF NAME(v_load)(const float *p) { return _mm512_loadu_ps(p); }
INL void NAME(v_store)(float *p, VF a) { _mm512_storeu_ps(p, a); }
INL VF NAME(v_set1)(float x) { return _mm512_set1_ps(x); }
INL VF NAME(v_fma)(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INL VF NAME(v_mul)(VF a, VF b) { return _mm512_mul_ps(a, b); }
INL VF NAME(v_add)(VF a, VF b) { return _mm512_add_ps(a, b); }
INL VF NAME(v_sub)(VF a, VF b) { return _mm512_sub_ps(a, b); }
INL VF NAME(v_div)(VF a, VF b) { return _mm512_div_ps(a, b); }
INL VF NAME(v_max)(VF a, VF b) { return _mm512_max_ps(a, b); }
INL VF NAME(v_min)(VF a, VF b) { return _mm512_min_ps(a, b); }

INL VF NAME(v_load16)(const uint16_t *p)
{
    __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}

INL VF NAME(v_round16)(VF a)
{
    __m512i u = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32((int)0xffff0000u)));
}

INL void NAME(v_store16)(uint16_t *p, VF a)
{
    __m512i u = _mm512_srli_epi32(_mm512_castps_si512(NAME(v_round16)(a)), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(u));
}

INL VP NAME(v_pairs)(const uint16_t *p) { return _mm512_loadu_si512(p); }
INL VP NAME(v_pair1)(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
INL VF NAME(v_dot2)(VP x, VP w, VF acc)
{
#if KF_DOT_BF16
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                          _mm512_castsi512_ps(_mm512_and_si512(w, high)), acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                           _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), acc);
#endif
}

/* 2**n where t = n + 1.5 * 2**23 */
INL VF NAME(v_pow2)(VF t)
{
    __m512i n = _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(0x4B400000 - 127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}

/* x < lo ? 0 : y (a NaN in x keeps y) */
INL VF NAME(v_zero_below)(VF x, float lo, VF y)
{
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, _mm512_set1_ps(lo), _CMP_LT_OQ), _mm512_setzero_ps());
}

INL void NAME(v_halves)(VF a, __m256 *lo, __m256 *hi)
{
    *lo = _mm512_castps512_ps256(a);
    *hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
}

INL float NAME(v_hsum)(VF a)
{
    __m256 lo, hi;
    NAME(v_halves)(a, &lo, &hi);
    __m256 s = _mm256_add_ps(lo, hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

INL float NAME(v_hmax)(VF a)
{
    __m256 lo, hi;
    NAME(v_halves)(a, &lo, &hi);
    __m256 s = _mm256_max_ps(lo, hi);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

/* As in AVX2, since AVX-512F has no such conversions either. */
INL void NAME(fixed_add8)(int64_t *sums, __m256 x)
{
    const __m512d wide = _mm512_cvtps_pd(x);
    const __m256i whole = _mm512_cvttpd_epi32(wide);
    const __m512d rest = _mm512_mul_pd(_mm512_sub_pd(wide, _mm512_cvtepi32_pd(whole)), _mm512_set1_pd(KF_FIXED_ONE));
    const __m512i low = _mm512_sub_epi64(_mm512_castpd_si512(_mm512_add_pd(rest, _mm512_set1_pd(KF_ROUND))),
                                         _mm512_set1_epi64(KF_ROUND_BITS));
    const __m512i high = _mm512_slli_epi64(_mm512_cvtepi32_epi64(whole), 32);
    _mm512_storeu_si512(sums, _mm512_add_epi64(_mm512_loadu_si512(sums), _mm512_add_epi64(high, low)));
}
INL void NAME(v_fixed_add)(int64_t *sums, VF x, float limit)
{
    if (__builtin_expect(_mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(limit), _CMP_LT_OQ) != 0xffff, 0)) {
        vf_plain one_by_one;
        memcpy(&one_by_one, &x, sizeof x);
        v_fixed_add_plain(sums, one_by_one, limit);
        return;
    }
    __m256 lo, hi;
    NAME(v_halves)(x, &lo, &hi);
    NAME(fixed_add8)(sums, lo);
    NAME(fixed_add8)(sums + 8, hi);
}

INL __m256 NAME(fixed8)(const int64_t *sums)
{
    const __m512d offset = _mm512_set1_pd(4503599627370496.0); /* 2^52: has a 32-bit number in its low bits */
    const __m512i whole = _mm512_loadu_si512(sums), mask = _mm512_set1_epi64(0xffffffff);
    const __m512d high = _mm512_mul_pd(_mm512_cvtepi32_pd(_mm512_cvtepi64_epi32(_mm512_srai_epi64(whole, 32))),
                                       _mm512_set1_pd(KF_FIXED_ONE));
    const __m512i low = _mm512_or_si512(_mm512_and_si512(whole, mask), _mm512_castpd_si512(offset));
    const __m512d sum = _mm512_add_pd(high, _mm512_sub_pd(_mm512_castsi512_pd(low), offset));
    return _mm512_cvtpd_ps(_mm512_mul_pd(sum, _mm512_set1_pd(1.0 / KF_FIXED_ONE)));
}
INL VF NAME(v_fixed)(const int64_t *sums)
{
    const __m512d lo = _mm512_castps_pd(_mm512_castps256_ps512(NAME(fixed8)(sums)));
    const VF x = _mm512_castpd_ps(_mm512_insertf64x4(lo, _mm256_castps_pd(NAME(fixed8)(sums + 8)), 1));
    const __mmask16 within = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(KF_FIXED_LIMIT), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_set1_ps(NAN), within, x);
}
