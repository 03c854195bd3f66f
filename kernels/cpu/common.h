/* What every instruction set builds on its sixteen lanes. Included once for each. */

INL VF NAME(v_load_n)(const float *p, int64_t n)
{
    float tmp[16] = {0};
    if (n >= 16)
        return NAME(v_load)(p);
    memcpy(tmp, p, (size_t)n * sizeof *p);
    return NAME(v_load)(tmp);
}

INL void NAME(v_store_n)(float *p, int64_t n, VF a)
{
    float tmp[16];
    if (n >= 16) {
        NAME(v_store)(p, a);
        return;
    }
    NAME(v_store)(tmp, a);
    memcpy(p, tmp, (size_t)n * sizeof *p);
}

INL VF NAME(v_load16_n)(const uint16_t *p, int64_t n)
{
    uint16_t tmp[16] = {0};
    if (n >= 16)
        return NAME(v_load16)(p);
    memcpy(tmp, p, (size_t)n * sizeof *p);
    return NAME(v_load16)(tmp);
}

INL void NAME(v_store16_n)(uint16_t *p, int64_t n, VF a)
{
    uint16_t tmp[16];
    if (n >= 16) {
        NAME(v_store16)(p, a);
        return;
    }
    NAME(v_store16)(tmp, a);
    memcpy(p, tmp, (size_t)n * sizeof *p);
}

#define EXP_LOWEST -87.33654f

/* e**x to about one unit in the last place: 2**n times the degree-5 polynomial of Cephes' expf on
 * [-ln2/2, ln2/2]. Clamped, so it never reaches 0 or infinity; NaN stays NaN (max and min keep b). */
INL VF NAME(v_exp)(VF x)
{
    const VF magic = NAME(v_set1)(12582912.0f); /* 1.5 * 2**23: adding it rounds to an integer */
    x = NAME(v_min)(NAME(v_set1)(88.37626f), NAME(v_max)(NAME(v_set1)(EXP_LOWEST), x));
    VF t = NAME(v_fma)(x, NAME(v_set1)(1.44269504088896341f), magic);
    VF n = NAME(v_sub)(t, magic);
    VF r = NAME(v_fma)(n, NAME(v_set1)(-0.693359375f), x);
    r = NAME(v_fma)(n, NAME(v_set1)(2.12194440e-4f), r);
    VF y = NAME(v_set1)(1.9875691500e-4f);
    y = NAME(v_fma)(y, r, NAME(v_set1)(1.3981999507e-3f));
    y = NAME(v_fma)(y, r, NAME(v_set1)(8.3334519073e-3f));
    y = NAME(v_fma)(y, r, NAME(v_set1)(4.1665795894e-2f));
    y = NAME(v_fma)(y, r, NAME(v_set1)(1.6666665459e-1f));
    y = NAME(v_fma)(y, r, NAME(v_set1)(5.0000001201e-1f));
    y = NAME(v_fma)(y, NAME(v_mul)(r, r), NAME(v_add)(r, NAME(v_set1)(1.0f)));
    return NAME(v_mul)(y, NAME(v_pow2)(t));
}

INL VF NAME(v_silu)(VF x)
{
    const VF zero = NAME(v_set1)(0.0f), one = NAME(v_set1)(1.0f);
    return NAME(v_div)(x, NAME(v_add)(one, NAME(v_exp)(NAME(v_sub)(zero, x))));
}

/* gelu in the form with tanh: x * 0.5 (1 + tanh(u)) = x / (1 + e**(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x**3). */
INL VF NAME(v_gelu)(VF x)
{
    const VF one = NAME(v_set1)(1.0f), square = NAME(v_mul)(x, x);
    const VF cubic = NAME(v_fma)(NAME(v_mul)(square, NAME(v_set1)(0.044715f)), x, x);
    return NAME(v_div)(x, NAME(v_add)(one, NAME(v_exp)(NAME(v_mul)(cubic, NAME(v_set1)(-1.5957691216057308f)))));
}

/* tanh to about one unit in the last place: below 0.625 the polynomial of Cephes' tanhf, else by e**(2 |x|). */
INL VF NAME(v_tanh)(VF x)
{
    const VF zero = NAME(v_set1)(0.0f), one = NAME(v_set1)(1.0f), border = NAME(v_set1)(0.625f);
    const VF size = NAME(v_max)(x, NAME(v_sub)(zero, x)), z = NAME(v_mul)(x, x);
    const VF e = NAME(v_add)(NAME(v_exp)(NAME(v_add)(size, size)), one);
    const VF far = NAME(v_mul)(NAME(v_sub)(one, NAME(v_div)(NAME(v_set1)(2.0f), e)), NAME(v_div)(x, size));
    VF y = NAME(v_set1)(-5.70498872745e-3f);
    y = NAME(v_fma)(y, z, NAME(v_set1)(2.06390887954e-2f));
    y = NAME(v_fma)(y, z, NAME(v_set1)(-5.37397155531e-2f));
    y = NAME(v_fma)(y, z, NAME(v_set1)(1.33314422036e-1f));
    y = NAME(v_fma)(y, z, NAME(v_set1)(-3.33332819422e-1f));
    y = NAME(v_fma)(NAME(v_mul)(y, z), x, x);
    const VF over = NAME(v_sub)(size, border);
    return NAME(v_add)(NAME(v_zero_below)(over, 0.0f, far),
                       NAME(v_zero_below)(NAME(v_sub)(zero, over), 1e-30f, y));
}

/* Scores s[0 .. 16 chunks) of one query row become e**((s - max) scale), scale > 0; those outside [start, end) become 0.
 * Lane i holds the keys whose absolute position is i modulo 16 (s begins at a multiple of 16), and chunks are
 * added in order: the sum depends on the row's own position only. Returns the sum. */
INL float NAME(softmax)(float *s, int64_t start, int64_t end, float scale)
{
    const VF by = NAME(v_set1)(scale);
    int64_t first = start / 16 * 16, last = (end + 15) / 16 * 16;
    for (int64_t i = first; i < start; i++)
        s[i] = -INFINITY;
    for (int64_t i = end; i < last; i++)
        s[i] = -INFINITY;
    VF m = NAME(v_set1)(-INFINITY);
    for (int64_t i = first; i < last; i += 16)
        m = NAME(v_max)(m, NAME(v_load)(s + i));
    m = NAME(v_set1)(NAME(v_hmax)(m));
    VF sum = NAME(v_set1)(0.0f);
    for (int64_t i = first; i < last; i += 16) {
        VF x = NAME(v_mul)(NAME(v_sub)(NAME(v_load)(s + i), m), by);
        VF e = NAME(v_zero_below)(x, EXP_LOWEST, NAME(v_exp)(x));
        NAME(v_store)(s + i, e);
        sum = NAME(v_add)(sum, e);
    }
    return NAME(v_hsum)(sum);
}
