/* Integers for quantised weights, in plain C: the definition of what the others must compute. All sums are exact, so
 * their order does not matter. Includes what vec_plain.h has. */
#define VQ VP /* weights of 16 outputs x 4 inputs, ready to be multiplied */
#define LANES(expr)                  \
    VF r;                            \
    for (int i = 0; i < 16; i++)     \
        r.l[i] = (expr);             \
    return r
#define WORDS(expr)                  \
    VP r;                            \
    for (int i = 0; i < 16; i++)     \
        r.l[i] = (uint32_t)(expr);   \
    return r

INL VP NAME(q_load)(const uint8_t *p) { VP r; memcpy(&r, p, sizeof r); return r; }
INL VP NAME(q_set1)(int32_t x) { WORDS(x); }
INL VP NAME(q_quad)(const int8_t *p)
{
    int32_t quad;
    memcpy(&quad, p, 4);
    return NAME(q_set1)(quad);
}
INL VF NAME(q_floats)(VP a) { LANES((float)(int32_t)a.l[i]); }
INL VP NAME(q_low)(VP a) { WORDS(a.l[i] & 0x0f0f0f0fu); }
INL VP NAME(q_high)(VP a) { WORDS(a.l[i] >> 4 & 0x0f0f0f0fu); }

/* acc + the four products of bytes, w from 0 to 255, x from -127 to 127. */
INL VP NAME(q_dot)(VP x, VP w, VP acc)
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 32; j += 8)
            acc.l[i] += (uint32_t)((int32_t)(w.l[i] >> j & 255u) * (int8_t)(x.l[i] >> j & 255u));
    return acc;
}

/* A group of 8 quads: begin, 8 times step, end: sum of x (w - offset), where less = -offset times the sum of x. */
INL VQ NAME(q8_weights)(VP w) { return w; }
INL VP NAME(q8_begin)(int32_t less) { return NAME(q_set1)(less); }
INL VP NAME(q8_step)(VP x, VQ w, VP acc) { return NAME(q_dot)(x, w, acc); }
INL VP NAME(q4_begin)(int32_t less) { return NAME(q_set1)(less); }
INL VP NAME(q4_step)(VP x, VP w, VP acc) { return NAME(q_dot)(x, w, acc); }
INL VP NAME(q4_end)(VP acc, int32_t less) { (void)less; return acc; }

/* Of each lane the four bits from `shift` on, or the byte, as a number less the offset. */
INL VF NAME(q_nibbles)(VP a, const int shift, const int offset)
{
    LANES((float)((int32_t)(a.l[i] >> shift & 15u) - offset));
}
INL VF NAME(q_bytes)(VP a, const int shift) { LANES((float)((int32_t)(a.l[i] >> shift & 255u) - 128)); }

/* Sixteen numbers of IEEE half precision, or bytes. */
INL float NAME(half)(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, low = h & 0x3ffu, exponent = h >> 10 & 31u;
    if (exponent == 0) {
        const float tiny = (float)low * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    return NAME(from_bits)(sign | (exponent + 112) << 23 | low << 13);
}
INL VF NAME(q_halves)(const uint8_t *p)
{
    uint16_t h[16];
    memcpy(h, p, sizeof h);
    LANES(NAME(half)(h[i]));
}
INL VF NAME(q_small)(const uint8_t *p) { LANES((float)p[i]); }
#undef WORDS
#undef LANES
