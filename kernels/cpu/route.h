/* Mixtures of experts for one element type and one instruction set: which experts a row takes, and what becomes of their
 * outputs. */

/* The largest first; of equal ones, the one with the lower number. Values that were taken become -1. */
INL void FN(route_row)(const kf_route_args *a, float *s, float *weights, int32_t *expert)
{
    const float all = NAME(softmax)(s, 0, a->experts, 1.0f);
    float chosen = 0.0f;
    for (int64_t c = 0; c < a->chosen; c++) {
        int64_t best = 0;
        while (s[best] == -1.0f)
            best++;
        for (int64_t i = best + 1; i < a->experts; i++)
            best = s[i] > s[best] ? i : best;
        expert[c] = (int32_t)best;
        weights[c] = s[best];
        chosen += s[best];
        s[best] = -1.0f;
    }
    for (int64_t c = 0; c < a->chosen; c++)
        weights[c] /= a->normalised ? chosen : all;
}

static TARGET void FN(route)(kf_worker *worker, const kf_route_args *a)
{
    const int64_t stride = a->experts;
    float s[KF_EXPERTS_MAX];
    for (int64_t row, end; kf_next(worker, a->rows, 8, &row, &end);)
        for (; row < end; row++) {
            memcpy(s, a->logits + row * stride, (size_t)stride * sizeof *s);
            FN(route_row)(a, s, a->weights + row * a->chosen, a->expert + row * a->chosen);
        }
}

/* out = or += the sum of a row's experts, each times its weight, in the order of the choice. */
static TARGET void FN(combine)(kf_worker *worker, const kf_combine_args *a)
{
    for (int64_t row, end; kf_next(worker, a->rows, 4, &row, &end);)
        for (; row < end; row++)
            for (int64_t i = 0; i < a->n; i += 16) {
                VF acc = NAME(v_set1)(0.0f);
                for (int64_t c = row * a->chosen; c < (row + 1) * a->chosen; c++)
                    acc = NAME(v_fma)(NAME(v_set1)(a->weights[c]),
                                      LDN((const T *)a->x + (int64_t)a->place[c] * a->n + i, a->n - i), acc);
                T *out = (T *)a->out + row * a->n + i;
                STN(out, a->n - i, a->add ? NAME(v_add)(LDN(out, a->n - i), RND(acc)) : acc);
            }
}
