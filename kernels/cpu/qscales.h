/* The scales of quantised weights, for one instruction set. */

/* The scales of group `g` for vectors [c0, c0 + NC) of a panel, whose data is at `p`; returns where its values are. `ds`
 * and `dm` keep those that several groups of Q4_K share. */
INL const uint8_t *NAME(q_scales)(const int F, const int NC, int c0, int64_t g, int64_t span, const uint8_t *p, VF *s,
                                VF *m, VF *ds, VF *dm)
{
    const int at = 16 * c0;
    switch (F) {
    case KF_INT8_F16:
    case KF_INT4_F16:
UNROLL(4)
        for (int c = 0; c < NC; c++)
            s[c] = NAME(q_halves)(p + 2 * (at + 16 * c));
        return p + 2 * KF_PANEL;
    case KF_INT4_F16_MIN:
UNROLL(4)
        for (int c = 0; c < NC; c++) {
            s[c] = NAME(q_halves)(p + 2 * (at + 16 * c));
            m[c] = NAME(q_halves)(p + 2 * (KF_PANEL + at + 16 * c));
        }
        return p + 4 * KF_PANEL;
    case KF_INT4_F32_MIN:
        if (g % span)
            return p;
UNROLL(4)
        for (int c = 0; c < NC; c++) {
            s[c] = NAME(v_load)((const float *)p + at + 16 * c);
            m[c] = NAME(v_load)((const float *)p + KF_PANEL + at + 16 * c);
        }
        return p + 8 * KF_PANEL;
    case KF_INT4_K:
        if (g % KF_K_GROUPS == 0) {
UNROLL(4)
            for (int c = 0; c < NC; c++) {
                ds[c] = NAME(q_halves)(p + 2 * (at + 16 * c));
                dm[c] = NAME(q_halves)(p + 2 * (KF_PANEL + at + 16 * c));
            }
            p += 4 * KF_PANEL;
        }
UNROLL(4)
        for (int c = 0; c < NC; c++) {
            s[c] = NAME(v_mul)(ds[c], NAME(q_small)(p + at + 16 * c));
            m[c] = NAME(v_sub)(NAME(v_set1)(0.0f),
                               NAME(v_mul)(dm[c], NAME(q_small)(p + KF_PANEL + at + 16 * c)));
        }
        return p + 2 * KF_PANEL;
    default:
        return p;
    }
}
