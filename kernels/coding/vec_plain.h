/* Eight bytes in one word, in plain C. The other vec_*.h have the same operations. */
#define NAME(x) x##_plain
#define TARGET
#define INL static inline __attribute__((always_inline))
#define V uint64_t
#define REGISTERS 16
#define FEW_LOOPS 1 /* quick to compile; speed is no aim here */
#define CHEAP_PRODUCTS 0
#define AHEAD 0
#define AHEAD_SUM 0
#define ONES 0x0101010101010101u

INL V NAME(v_load)(const uint8_t *p)
{
    V a;
    memcpy(&a, p, sizeof a);
    return a;
}
INL void NAME(v_store)(uint8_t *p, V a) { memcpy(p, &a, sizeof a); }
INL void NAME(v_stream)(uint8_t *p, V a) { NAME(v_store)(p, a); }
INL V NAME(v_zero)(void) { return 0; }
INL V NAME(v_add)(V a, V b) { return a ^ b; }

/* 2 q + d */
INL V NAME(v_horner)(V q, V d) { return ((q & 0x7f * ONES) << 1) ^ ((q >> 7 & ONES) * 0x1d) ^ d; }

typedef const kf_product *factor_plain;
typedef V operand_plain;
INL operand_plain NAME(v_operand)(V a) { return a; }
INL factor_plain NAME(v_factor)(uint8_t c) { return &kf_products[c]; }
INL V NAME(v_mul_add)(V sum, factor_plain c, operand_plain a)
{
    V product = 0;
    for (int shift = 0; shift < 64; shift += 8)
        product |= (V)(uint8_t)(c->low[a >> shift & 15] ^ c->high[a >> shift >> 4 & 15]) << shift;
    return sum ^ product;
}
