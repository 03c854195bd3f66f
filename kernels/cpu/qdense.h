/* x W^T of quantised weights for float rows and one instruction set: a panel becomes the floats that it stands for, and
 * their product is that of dense weights. So the results have the bits that a checkpoint of these floats has.
 *
 * Value: fma(q - offset, scale, min), or (q - offset) * scale. */

INL void NAME(q_group_floats)(const int F, const uint8_t *p, const VF *s, const VF *m, int64_t inputs, float *out)
{
    const int PER_WORD = Q_IS8(F) ? 4 : 8;
    for (int first = 0; first < KF_QGROUP && first < inputs; first += PER_WORD) {
UNROLL(4)
        for (int c = 0; c < 4; c++) {
            const VP word = NAME(q_load)(p + (first / PER_WORD * KF_PANEL + 16 * c) * 4);
UNROLL(8)
            for (int i = 0; i < PER_WORD; i++) {
                const VF q = Q_IS8(F) ? NAME(q_bytes)(word, 8 * i)
                                      : NAME(q_nibbles)(word, 8 * (i & 3) + 4 * (i >> 2), Q_OFFSET(F));
                if (first + i < inputs)
                    NAME(v_store)(out + (first + i) * KF_PANEL + 16 * c,
                                  Q_HAS_MIN(F) ? NAME(v_fma)(q, s[c], m[c]) : NAME(v_mul)(q, s[c]));
            }
        }
    }
}

/* A panel as [k][64] floats. */
INL void NAME(q_floats_of)(const int F, const uint8_t *p, int64_t k, int64_t span, float *out)
{
    VF s[4], m[4], ds[4], dm[4];
UNROLL(4)
    for (int c = 0; c < 4; c++) {
        s[c] = m[c] = ds[c] = dm[c] = NAME(v_set1)(0.0f);
        if (F == KF_INT8_ROW)
            s[c] = NAME(v_load)((const float *)p + 16 * c);
    }
    if (F == KF_INT8_ROW)
        p += KF_SCALES_BYTES;
    for (int64_t g = 0; g < kf_groups(k); g++) {
        p = NAME(q_scales)(F, 4, 0, g, span, p, s, m, ds, dm);
        NAME(q_group_floats)(F, p, s, m, k - g * KF_QGROUP, out + g * KF_QGROUP * KF_PANEL);
        p += Q_VALUE_BYTES(F);
    }
}

#define FLOATS(F)                                                                                      \
    static TARGET void NAME(q_floats_##F)(const uint8_t *p, int64_t k, int64_t span, float *out)     \
    {                                                                                                  \
        NAME(q_floats_of)(F, p, k, span, out);                                                         \
    }
FLOATS(KF_INT8_ROW) FLOATS(KF_INT8_F16) FLOATS(KF_INT4_F16) FLOATS(KF_INT4_F16_MIN) FLOATS(KF_INT4_F32_MIN)
FLOATS(KF_INT4_K)
#undef FLOATS

static void NAME(q_panel_floats)(const kf_weight *w, int64_t k, int64_t panel, float *out)
{
    static void (*const floats[])(const uint8_t *, int64_t, int64_t, float *) = {
        NAME(q_floats_KF_INT8_ROW), NAME(q_floats_KF_INT8_F16), NAME(q_floats_KF_INT4_F16),
        NAME(q_floats_KF_INT4_F16_MIN), NAME(q_floats_KF_INT4_F32_MIN), NAME(q_floats_KF_INT4_K)};
    const uint8_t *p = (const uint8_t *)w->w + panel * kf_panel_bytes(w->format, kf_groups(k), w->span);
    floats[w->format - KF_INT8_ROW](p, k, w->span, out);
}
