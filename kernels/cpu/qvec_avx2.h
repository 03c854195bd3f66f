/* Integers for quantised weights with AVX2. The contract of the operations is in qvec_plain.h. */
#undef TARGET
#undef INL
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INL static inline __attribute__((always_inline)) TARGET

/* Signed weights and their magnitudes: the one instruction that multiplies bytes takes an unsigned operand, and two
 * products of it fit into 16 bits only up to 128 * 127. */
typedef struct { VP value, size; } vq_avx2;
#define VQ vq_avx2
#define BOTH(op, a, b) ((VP){op((a).lo, (b).lo), op((a).hi, (b).hi)})
#define EACH(op, a, n) ((VP){op((a).lo, n), op((a).hi, n)})

INL VP NAME(q_load)(const uint8_t *p)
{
    return (VP){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
INL VP NAME(q_set1)(int32_t x) { return (VP){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INL VP NAME(q_quad)(const int8_t *p)
{
    int32_t quad;
    memcpy(&quad, p, 4);
    return NAME(q_set1)(quad);
}
INL VF NAME(q_floats)(VP a) { return (VF){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INL VP NAME(q_low)(VP a) { return EACH(_mm256_and_si256, a, _mm256_set1_epi8(15)); }
INL VP NAME(q_high)(VP a)
{
    const VP shifted = EACH(_mm256_srli_epi16, a, 4);
    return EACH(_mm256_and_si256, shifted, _mm256_set1_epi8(15));
}

INL VQ NAME(q8_weights)(VP w)
{
    const VP value = EACH(_mm256_xor_si256, w, _mm256_set1_epi8((char)0x80));
    return (VQ){value, {_mm256_abs_epi8(value.lo), _mm256_abs_epi8(value.hi)}};
}
INL VP NAME(q8_begin)(int32_t less) { (void)less; return NAME(q_set1)(0); }
INL VP NAME(q8_step)(VP x, VQ w, VP acc)
{
    const VP signs = BOTH(_mm256_sign_epi8, x, w.value), pairs = BOTH(_mm256_maddubs_epi16, w.size, signs);
    const VP quads = EACH(_mm256_madd_epi16, pairs, _mm256_set1_epi16(1));
    return BOTH(_mm256_add_epi32, acc, quads);
}

/* Sums of four bits times seven: all of a group fit into 16 bits. */
INL VP NAME(q4_begin)(int32_t less) { (void)less; return NAME(q_set1)(0); }
INL VP NAME(q4_step)(VP x, VP w, VP acc)
{
    const VP pairs = BOTH(_mm256_maddubs_epi16, w, x);
    return BOTH(_mm256_add_epi16, acc, pairs);
}
INL VP NAME(q4_end)(VP acc, int32_t less)
{
    const VP quads = EACH(_mm256_madd_epi16, acc, _mm256_set1_epi16(1)), from = NAME(q_set1)(less);
    return BOTH(_mm256_add_epi32, from, quads);
}

INL __m256 NAME(lanes_less)(__m256i a, const int shift, const int mask, const int offset)
{
    const __m256i bits = _mm256_and_si256(_mm256_srli_epi32(a, shift), _mm256_set1_epi32(mask));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(offset)));
}
INL VF NAME(q_nibbles)(VP a, const int shift, const int offset)
{
    return (VF){NAME(lanes_less)(a.lo, shift, 15, offset), NAME(lanes_less)(a.hi, shift, 15, offset)};
}
INL VF NAME(q_bytes)(VP a, const int shift)
{
    return (VF){NAME(lanes_less)(a.lo, shift, 255, 128), NAME(lanes_less)(a.hi, shift, 255, 128)};
}

INL VF NAME(q_halves)(const uint8_t *p)
{
    return (VF){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
INL VF NAME(q_small)(const uint8_t *p)
{
    return (VF){_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
#undef BOTH
#undef EACH
