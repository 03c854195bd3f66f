/* out = x W^T + bias for one element type and one instruction set.
 *
 * W is packed as [ceil(n / 16)][k][16]: one vector holds the weights of sixteen outputs for one input. Each output is
 *   fma over d = 0, 1, ..., k - 1, then the bias, then one rounding,
 * whatever tile of rows and panels it is computed in: the bits of a row do not depend on the other rows. */

/* VR rows by NC panels; VR and NC are constants at every call. left: columns from out on (may be under 16 NC). */
INL void FN(linear_tile)(const int VR, const int NC, const float *x, int64_t k, const T *w, const T *bias, T *out,
                         int64_t out_stride, int64_t left)
{
    VF acc[24];
#pragma GCC unroll 24
    for (int i = 0; i < VR * NC; i++)
        acc[i] = NAME(v_set1)(0.0f);
    for (int64_t d = 0; d < k; d++) {
        VF wv[8];
#pragma GCC unroll 8
        for (int c = 0; c < NC; c++)
            wv[c] = LD(w + (c * k + d) * 16);
#pragma GCC unroll 8
        for (int r = 0; r < VR; r++) {
            VF xv = NAME(v_set1)(x[r * k + d]);
#pragma GCC unroll 8
            for (int c = 0; c < NC; c++)
                acc[r * NC + c] = NAME(v_fma)(xv, wv[c], acc[r * NC + c]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < NC; c++) {
        int64_t n = left - 16 * c;
        VF b = bias ? LDN(bias + 16 * c, n) : NAME(v_set1)(0.0f);
#pragma GCC unroll 8
        for (int r = 0; r < VR; r++)
            STN(out + r * out_stride + 16 * c, n, bias ? NAME(v_add)(acc[r * NC + c], b) : acc[r * NC + c]);
    }
}

/* All rows over NC8 panels at eight rows, NC4 at four, and so on; these are the tiles that fill the registers. */
INL void FN(linear_panels)(const int VR, const int NC, const float *x, int64_t rows, int64_t k, const T *w,
                           const T *bias, T *out, int64_t n)
{
    int64_t panels = (n + 15) / 16, p = 0;
    for (; p + NC <= panels; p += NC)
        for (int64_t r = 0; r < rows; r += VR)
            FN(linear_tile)(VR, NC, x + r * k, k, w + p * k * 16, bias ? bias + p * 16 : NULL, out + r * n + p * 16, n,
                            n - p * 16);
    for (; p < panels; p++)
        for (int64_t r = 0; r < rows; r += VR)
            FN(linear_tile)(VR, 1, x + r * k, k, w + p * k * 16, bias ? bias + p * 16 : NULL, out + r * n + p * 16, n,
                            n - p * 16);
}

static TARGET void FN(linear)(const void *x_any, const void *w_any, const void *bias_any, void *out_any, int64_t rows,
                              int64_t k, int64_t n, float *scratch)
{
    const T *x = x_any, *w = w_any, *bias = bias_any;
    T *out = out_any;
    /* Few enough rows at a time that they stay in the cache while all weights stream past them. */
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r, block = left < KF_ROW_BLOCK ? left : KF_ROW_BLOCK;
        const float *wide = FN(widen)(x + r * k, block * k, scratch);
        int64_t done = 0;
#define ROWS(VR, NC)                                                                                      \
    if (block - done >= VR) {                                                                             \
        int64_t some = (block - done) / VR * VR;                                                          \
        FN(linear_panels)(VR, NC, wide + done * k, some, k, w, bias, out + (r + done) * n, n);            \
        done += some;                                                                                     \
    }
        ROWS(8, WIDE ? 3 : 1)
        ROWS(4, WIDE ? 4 : 1)
        ROWS(2, WIDE ? 6 : 2)
        ROWS(1, WIDE ? 8 : 4)
#undef ROWS
        r += block;
    }
}
