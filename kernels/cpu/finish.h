/* What a product ends with, for one element type and one instruction set. */

/* What becomes of the sums of one row of a panel. */
static TARGET void FN(linear_finish)(const kf_linear_args *a, const VF *sums, int64_t row, int64_t panel)
{
    const T *bias = a->w.bias;
    for (int c = 0; c < 4; c++) {
        const int64_t at = panel * KF_PANEL + 16 * c, left = a->n - at;
        if (left <= 0)
            return;
        VF sum = bias ? NAME(v_add)(sums[c], LDN(bias + at, left)) : sums[c];
        T *out = (T *)a->out + row * a->n + at;
        if (a->epilogue == KF_FLOAT)
            NAME(v_store_n)((float *)a->out + row * a->n + at, left, sum);
        else if (a->epilogue == KF_ADD)
            STN(out, left, NAME(v_add)(LDN(out, left), RND(sum)));
        else
            STN(out, left, sum);
    }
}

/* The same for gate (vectors 0 and 1) and up (2 and 3) of 32 columns; bias holds all gates, then all ups. */
static TARGET void FN(gated_finish)(const kf_linear_args *a, const VF *sums, int64_t row, int64_t panel)
{
    const T *bias = a->w.bias;
    for (int c = 0; c < 2; c++) {
        const int64_t at = panel * KF_PANEL / 2 + 16 * c, left = a->n - at;
        if (left <= 0)
            return;
        VF gate = sums[c], up = sums[c + 2];
        if (bias) {
            gate = NAME(v_add)(gate, LDN(bias + at, left));
            up = NAME(v_add)(up, LDN(bias + a->n + at, left));
        }
        gate = RND(gate);
        gate = a->epilogue == KF_GELU_MUL ? NAME(v_gelu)(gate) : NAME(v_silu)(gate);
        STN((T *)a->out + row * a->n + at, left, NAME(v_mul)(RND(gate), RND(up)));
    }
}
