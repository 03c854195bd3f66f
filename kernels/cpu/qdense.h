/* x W^T of quantised weights for float rows and one instruction set: a panel becomes the floats that it stands for, and
 * their product is that of dense weights. So the results have the bits that a checkpoint of these floats has.
 *
 * Value: fma(q - offset, scale, min), or (q - offset) * scale. */

INL VF NAME(q_value)(const int F, VP word, const int i, VF scale, VF min)
{
    const VF q = Q_IS8(F) ? NAME(q_bytes)(word, 8 * i)
                          : NAME(q_nibbles)(word, 8 * (i & 3) + 4 * (i >> 2), Q_OFFSET(F));
    return Q_HAS_MIN(F) ? NAME(v_fma)(q, scale, min) : NAME(v_mul)(q, scale);
}

INL void NAME(q_group_floats)(const int F, const uint8_t *p, const VF *s, const VF *m, int64_t inputs, float *out)
{
    const int PER_WORD = Q_IS8(F) ? 4 : 8;
    for (int first = 0; first < KF_QGROUP && first < inputs; first += PER_WORD) {
UNROLL(4)
        for (int c = 0; c < 4; c++) {
            const VP word = NAME(q_load)(p + (first / PER_WORD * KF_PANEL + 16 * c) * 4);
UNROLL(8)
            for (int i = 0; i < PER_WORD; i++) {
                const VF value = NAME(q_value)(F, word, i, s[c], m[c]);
                if (first + i < inputs)
                    NAME(v_store)(out + (first + i) * KF_PANEL + 16 * c, value);
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

/* One group of VR float rows by NC vectors of a panel. */
INL void FN(q_group_rows)(const int F, const int VR, const int NC, const float *x, int64_t k, const uint8_t *p,
                          const VF *s, const VF *m, const int64_t inputs, VF *acc)
{
    const int PER_WORD = Q_IS8(F) ? 4 : 8;
    for (int first = 0; first < inputs; first += PER_WORD) {
        VP word[4];
UNROLL(4)
        for (int c = 0; c < NC; c++)
            word[c] = NAME(q_load)(p + (first / PER_WORD * KF_PANEL + 16 * c) * 4);
UNROLL(8)
        for (int i = 0; i < PER_WORD; i++) {
            VF value[4];
            if (first + i >= inputs)
                break;
UNROLL(4)
            for (int c = 0; c < NC; c++)
                value[c] = NAME(q_value)(F, word[c], i, s[c], m[c]);
UNROLL(4)
            for (int r = 0; r < VR; r++) {
                const VF xv = NAME(v_set1)(x[r * k + first + i]);
UNROLL(4)
                for (int c = 0; c < NC; c++)
                    acc[r * NC + c] = NAME(v_fma)(xv, value[c], acc[r * NC + c]);
            }
        }
    }
}

/* VR rows of one panel without a detour through memory, which pays for a few rows. */
INL void FN(q_tile_rows)(const int F, const int VR, const kf_linear_args *a, int64_t row, int64_t panel)
{
    const int NC = WIDE ? 4 : VR == 4 ? 1 : 2;
    const int64_t k = a->k, groups = kf_groups(k), span = a->w.span;
    const float *x = (const float *)a->x + row * k;
    VF sums[4 * 4], s[4], m[4], ds[4], dm[4], acc[16];
    for (int c0 = 0; c0 < 4; c0 += NC) {
        const uint8_t *p = (const uint8_t *)a->w.w + panel * kf_panel_bytes(F, groups, span);
UNROLL(4)
        for (int c = 0; c < NC; c++) {
            s[c] = m[c] = ds[c] = dm[c] = NAME(v_set1)(0.0f);
            if (F == KF_INT8_ROW)
                s[c] = NAME(v_load)((const float *)p + 16 * (c0 + c));
        }
UNROLL(16)
        for (int i = 0; i < VR * NC; i++)
            acc[i] = NAME(v_set1)(0.0f);
        if (F == KF_INT8_ROW)
            p += KF_SCALES_BYTES;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t left = k - g * KF_QGROUP;
            p = NAME(q_scales)(F, NC, c0, g, span, p, s, m, ds, dm);
            if (left >= KF_QGROUP)
                FN(q_group_rows)(F, VR, NC, x + g * KF_QGROUP, k, p + 64 * c0, s, m, KF_QGROUP, acc);
            else
                FN(q_group_rows)(F, VR, NC, x + g * KF_QGROUP, k, p + 64 * c0, s, m, left, acc);
            p += Q_VALUE_BYTES(F);
        }
UNROLL(4)
        for (int r = 0; r < VR; r++)
UNROLL(4)
            for (int c = 0; c < NC; c++)
                sums[r * 4 + c0 + c] = acc[r * NC + c];
    }
    for (int r = 0; r < VR; r++)
        if (kf_is_gated(a->epilogue))
            FN(gated_finish)(a, sums + r * 4, row + r, panel);
        else
            FN(linear_finish)(a, sums + r * 4, row + r, panel);
}

#define ROWS(F, VR)                                                                               \
    static TARGET void FN(q_rows_##F##_##VR)(const kf_linear_args *a, int64_t row, int64_t panel) \
    {                                                                                             \
        FN(q_tile_rows)(F, VR, a, row, panel);                                                    \
    }
#define FLOATS(F)                                                                                      \
    static TARGET void NAME(q_floats_##F)(const uint8_t *p, int64_t k, int64_t span, float *out)     \
    {                                                                                                  \
        NAME(q_floats_of)(F, p, k, span, out);                                                         \
    }
#define BOTH(F) FLOATS(F) ROWS(F, 1) ROWS(F, 2) ROWS(F, 4)
BOTH(KF_INT8_ROW) BOTH(KF_INT8_F16) BOTH(KF_INT4_F16) BOTH(KF_INT4_F16_MIN) BOTH(KF_INT4_F32_MIN) BOTH(KF_INT4_K)
#undef BOTH
#undef ROWS
#undef FLOATS

static void NAME(q_panel_floats)(const kf_weight *w, int64_t k, int64_t panel, float *out)
{
    static void (*const floats[])(const uint8_t *, int64_t, int64_t, float *) = {
        NAME(q_floats_KF_INT8_ROW), NAME(q_floats_KF_INT8_F16), NAME(q_floats_KF_INT4_F16),
        NAME(q_floats_KF_INT4_F16_MIN), NAME(q_floats_KF_INT4_F32_MIN), NAME(q_floats_KF_INT4_K)};
    const uint8_t *p = (const uint8_t *)w->w + panel * kf_panel_bytes(w->format, kf_groups(k), w->span);
    floats[w->format - KF_INT8_ROW](p, k, w->span, out);
}

static void FN(q_panel_rows)(const kf_linear_args *a, int64_t panel)
{
#define ALL(F) {FN(q_rows_##F##_1), FN(q_rows_##F##_2), FN(q_rows_##F##_4)}
    static void (*const rows[][3])(const kf_linear_args *, int64_t, int64_t) = {
        ALL(KF_INT8_ROW), ALL(KF_INT8_F16), ALL(KF_INT4_F16), ALL(KF_INT4_F16_MIN), ALL(KF_INT4_F32_MIN), ALL(KF_INT4_K)};
#undef ALL
    for (int64_t row = 0; row < a->rows;) {
        const int size = a->rows - row >= 4 ? 2 : a->rows - row >= 2 ? 1 : 0;
        rows[a->w.format - KF_INT8_ROW][size](a, row, panel);
        row += 1 << size;
    }
}
