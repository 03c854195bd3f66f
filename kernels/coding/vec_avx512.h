/* 64 bytes. Included twice: with KF_GFNI 1 a product is one instruction. */
#if KF_GFNI
#define NAME(x) x##_gfni
#define TARGET __attribute__((target("avx512f,avx512bw,gfni")))
#else
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw")))
#endif
#define INL static inline __attribute__((always_inline)) TARGET
#define V __m512i
#define REGISTERS 32
#define FEW_LOOPS 0
#define CHEAP_PRODUCTS KF_GFNI
#define AHEAD 256
#define AHEAD_SUM 0
#undef STREAM_SUM
#define STREAM_SUM sum_avx2 /* faster than 64 bytes at a time where memory is the limit */

INL V NAME(v_load)(const uint8_t *p) { return _mm512_loadu_si512(p); }
INL void NAME(v_store)(uint8_t *p, V a) { _mm512_storeu_si512(p, a); }
INL void NAME(v_stream)(uint8_t *p, V a) { _mm512_stream_si512((V *)p, a); }
INL V NAME(v_zero)(void) { return _mm512_setzero_si512(); }
INL V NAME(v_add)(V a, V b) { return _mm512_xor_si512(a, b); }

#if KF_GFNI
typedef V factor_gfni;
INL V NAME(v_factor)(uint8_t c) { return _mm512_set1_epi64((long long)kf_products[c].affine); }
typedef V operand_gfni;
INL operand_gfni NAME(v_operand)(V a) { return a; }
INL V NAME(v_mul_add)(V sum, V c, V a) { return _mm512_xor_si512(sum, _mm512_gf2p8affine_epi64_epi8(a, c, 0)); }
INL V NAME(v_horner)(V q, V d) { return NAME(v_mul_add)(d, NAME(v_factor)(2), q); }
#else
INL V NAME(v_horner)(V q, V d)
{
    V carry = _mm512_maskz_mov_epi8(_mm512_movepi8_mask(q), _mm512_set1_epi8(0x1d));
    return _mm512_ternarylogic_epi64(_mm512_add_epi8(q, q), carry, d, 0x96); /* the sum of all three */
}

typedef struct { V low, high; } factor_avx512;
INL factor_avx512 NAME(v_factor)(uint8_t c)
{
    return (factor_avx512){_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)kf_products[c].low)),
                           _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)kf_products[c].high))};
}
typedef struct { V low, high; } operand_avx512;
INL operand_avx512 NAME(v_operand)(V a)
{
    const V half = _mm512_set1_epi8(15);
    return (operand_avx512){_mm512_and_si512(a, half), _mm512_and_si512(_mm512_srli_epi16(a, 4), half)};
}
INL V NAME(v_mul_add)(V sum, factor_avx512 c, operand_avx512 a)
{
    return _mm512_ternarylogic_epi64(sum, _mm512_shuffle_epi8(c.low, a.low), _mm512_shuffle_epi8(c.high, a.high), 0x96);
}
#endif
