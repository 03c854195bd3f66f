/* Products as sums over shards of their inputs, in fixed point, for one element type and one instruction set.
 *
 * A shard's partial sum, a float, is added to the others as a whole number of 2^-32: the bits do not depend on who computes
 * which shard, and in what order they are added. */

/* Partial sums of so many vectors. Not inlined: there are dozens of tiles. */
static TARGET __attribute__((noinline)) void FN(fixed_add)(int64_t *totals, const VF *partial, int vectors, float limit)
{
    for (int i = 0; i < vectors; i++)
        NAME(v_fixed_add)(totals + 16 * i, partial[i], limit);
}

/* What becomes of the total of one row of a panel. */
static TARGET __attribute__((noinline)) void FN(fixed_end)(const kf_linear_args *a, const int64_t *totals, int64_t row,
                                                            int64_t panel)
{
    const kf_sum *sum = a->sum;
    if (!sum->totals) {
        VF values[4];
        for (int c = 0; c < 4; c++)
            values[c] = NAME(v_fixed)(totals + 16 * c);
        FN(linear_finish)(a, values, row, panel);
        return;
    }
    const int64_t left = a->n - panel * KF_PANEL, n = left < KF_PANEL ? left : KF_PANEL;
    int64_t *out = sum->totals + (sum->places ? sum->places[row] : row) * a->n + panel * KF_PANEL;
    if (!sum->add)
        memcpy(out, totals, (size_t)n * sizeof *out);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] += totals[i];
}

/* The totals [rows, n] of all ranks become what a->epilogue says. */
static TARGET void FN(fixed_finish)(kf_worker *worker, const kf_linear_args *a, const int64_t *totals)
{
    for (int64_t row, end; kf_next(worker, a->rows, 8, &row, &end);)
        for (; row < end; row++)
            for (int64_t panel = 0; panel * KF_PANEL < a->n; panel++) {
                const int64_t left = a->n - panel * KF_PANEL;
                const int64_t *from = totals + row * a->n + panel * KF_PANEL;
                int64_t some[KF_PANEL] = {0};
                if (left < KF_PANEL)
                    from = memcpy(some, from, (size_t)left * sizeof *some);
                VF values[4];
                for (int c = 0; c < 4; c++)
                    values[c] = NAME(v_fixed)(from + 16 * c);
                FN(linear_finish)(a, values, row, panel);
            }
}
