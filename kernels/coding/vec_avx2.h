/* 32 bytes; a product is two look-ups of half a byte. */
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define INL static inline __attribute__((always_inline)) TARGET
#define V __m256i
#define REGISTERS 16
#define FEW_LOOPS 0
#define CHEAP_PRODUCTS 0
#define AHEAD 384
#define AHEAD_SUM 128

INL V NAME(v_load)(const uint8_t *p) { return _mm256_loadu_si256((const V *)p); }
INL void NAME(v_store)(uint8_t *p, V a) { _mm256_storeu_si256((V *)p, a); }
INL void NAME(v_stream)(uint8_t *p, V a) { _mm256_stream_si256((V *)p, a); }
INL V NAME(v_zero)(void) { return _mm256_setzero_si256(); }
INL V NAME(v_add)(V a, V b) { return _mm256_xor_si256(a, b); }

INL V NAME(v_horner)(V q, V d)
{
    V shifted = _mm256_xor_si256(_mm256_add_epi8(q, q), d);
    return _mm256_blendv_epi8(shifted, _mm256_xor_si256(shifted, _mm256_set1_epi8(0x1d)), q);
}

typedef struct { V low, high; } factor_avx2;
INL factor_avx2 NAME(v_factor)(uint8_t c)
{
    return (factor_avx2){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)kf_products[c].low)),
                         _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)kf_products[c].high))};
}
typedef struct { V low, high; } operand_avx2;
INL operand_avx2 NAME(v_operand)(V a)
{
    const V half = _mm256_set1_epi8(15);
    return (operand_avx2){_mm256_and_si256(a, half), _mm256_and_si256(_mm256_srli_epi16(a, 4), half)};
}
INL V NAME(v_mul_add)(V sum, factor_avx2 c, operand_avx2 a)
{
    V low = _mm256_shuffle_epi8(c.low, a.low), high = _mm256_shuffle_epi8(c.high, a.high);
    return _mm256_xor_si256(sum, _mm256_xor_si256(low, high));
}
