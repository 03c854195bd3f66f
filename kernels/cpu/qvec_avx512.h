/* Integers for quantised weights with AVX-512 VNNI. The contract of the operations is in qvec_plain.h. */
#undef TARGET
#undef INL
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INL static inline __attribute__((always_inline)) TARGET

#define VQ VP

INL VP NAME(q_load)(const uint8_t *p) { return _mm512_loadu_si512(p); }
INL VP NAME(q_set1)(int32_t x) { return _mm512_set1_epi32(x); }
INL VP NAME(q_quad)(const int8_t *p)
{
    int32_t quad;
    memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
}
INL VF NAME(q_floats)(VP a) { return _mm512_cvtepi32_ps(a); }
INL VP NAME(q_low)(VP a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INL VP NAME(q_high)(VP a) { return _mm512_and_si512(_mm512_srli_epi32(a, 4), _mm512_set1_epi8(15)); }

INL VQ NAME(q8_weights)(VP w) { return w; }
INL VP NAME(q8_begin)(int32_t less) { return _mm512_set1_epi32(less); }
INL VP NAME(q8_step)(VP x, VQ w, VP acc) { return _mm512_dpbusd_epi32(acc, w, x); }
INL VP NAME(q4_begin)(int32_t less) { return _mm512_set1_epi32(less); }
INL VP NAME(q4_step)(VP x, VP w, VP acc) { return _mm512_dpbusd_epi32(acc, w, x); }
INL VP NAME(q4_end)(VP acc, int32_t less) { (void)less; return acc; }

/* Looked up: the permutation takes the lowest four bits of a lane, so that nothing has to be masked off. */
INL VF NAME(q_nibbles)(VP a, const int shift, const int offset)
{
    const VF table = _mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                   _mm512_set1_ps((float)offset));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(a, (unsigned)shift), table);
}
INL VF NAME(q_bytes)(VP a, const int shift)
{
    const VP bits = _mm512_and_si512(_mm512_srli_epi32(a, (unsigned)shift), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(bits, _mm512_set1_epi32(128)));
}

INL VF NAME(q_halves)(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INL VF NAME(q_small)(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
