/* x W^T for one element type and one instruction set.
 *
 * W is packed in panels of 64 outputs, [panels][k / GROUP][64][GROUP]: four vectors hold the weights of 64 outputs for
 * one group of inputs, and a panel is read from front to back. Each output is
 *   DOT over d = 0, 1, ..., k / GROUP - 1, then the bias, then one rounding,
 * whatever tile of rows it is computed in: the bits of a row do not depend on the other rows. */

/* Adds up VR rows, `stride` apart, by NC vectors of one panel over k inputs; VR, NC and FETCH are constants at every call.
 * On the way, FETCH cache lines a group are asked for from `ahead` on. */
INL void FN(linear_sums)(const int VR, const int NC, const int FETCH, const T *x, int64_t stride, int64_t k, const T *w,
                         const char *ahead, VF *acc)
{
UNROLL(24)
    for (int i = 0; i < VR * NC; i++)
        acc[i] = NAME(v_set1)(0.0f);
    for (int64_t d = 0; d < k / GROUP; d++) {
        VG wv[4];
UNROLL(4)
        for (int c = 0; c < NC; c++)
            wv[c] = LDG(w + (d * KF_PANEL + 16 * c) * GROUP);
UNROLL(2)
        for (int i = 0; i < FETCH; i++)
            __builtin_prefetch(ahead + (d * FETCH + i) * 64, 0, 2);
UNROLL(6)
        for (int r = 0; r < VR; r++) {
            VG xv = SETG(x + r * stride + d * GROUP);
UNROLL(4)
            for (int c = 0; c < NC; c++)
                acc[r * NC + c] = DOT(xv, wv[c], acc[r * NC + c]);
        }
    }
}

/* VR rows of one panel, as many of its vectors at a time as fill the registers; shard by shard where there are shards. */
INL void FN(linear_tile)(const int VR, const int FETCH, const kf_linear_args *a, int64_t row, int64_t panel,
                         const char *ahead)
{
    const int NC = WIDE || VR == 1 ? 4 : VR <= 3 ? 2 : 1;
    const T *x = (const T *)a->x + row * a->k, *w = (const T *)a->w.w + (panel - a->first_panel) * KF_PANEL * a->k;
    const kf_sum *sum = a->sum;
    const int64_t shards = sum ? sum->cut.shards : 1;
    VF sums[6 * 4], some[6 * 4];
    int64_t totals[6 * KF_PANEL];
    if (sum)
        memset(totals, 0, (size_t)(VR * KF_PANEL) * sizeof *totals);
    for (int64_t shard = 0, begin = 0; shard < shards; shard++) {
        const int64_t end = sum ? sum->cut.ends[shard] : a->k;
UNROLL(4)
        for (int c = 0; c < 4; c += NC) {
            FN(linear_sums)(VR, NC, FETCH, x + begin, a->k, end - begin, w + begin * KF_PANEL + 16 * c * GROUP,
                            ahead + begin / GROUP * FETCH * 64, some);
UNROLL(6)
            for (int r = 0; r < VR; r++)
UNROLL(4)
                for (int j = 0; j < NC; j++)
                    sums[r * 4 + c + j] = some[r * NC + j];
        }
        if (sum)
            FN(fixed_add)(totals, sums, VR * 4, sum->limit);
        begin = end;
    }
    for (int r = 0; r < VR; r++)
        if (sum)
            FN(fixed_end)(a, totals + r * KF_PANEL, row + r, panel);
        else if (kf_is_gated(a->epilogue))
            FN(gated_finish)(a, sums + r * 4, row + r, panel);
        else
            FN(linear_finish)(a, sums + r * 4, row + r, panel);
}

#define TILE(VR, FETCH)                                                                                    \
    static TARGET void FN(linear_##VR##_##FETCH)(const kf_linear_args *a, int64_t row, int64_t panel, const char *p) \
    {                                                                                                      \
        FN(linear_tile)(VR, FETCH, a, row, panel, p);                                                      \
    }
#define TILES(FETCH) TILE(1, FETCH) TILE(2, FETCH) TILE(3, FETCH) TILE(4, FETCH) TILE(5, FETCH) TILE(6, FETCH)
TILES(0)
#if WIDE
TILES(1) TILES(2)
#endif
#undef TILES
#undef TILE

/* One panel for the rows [begin, end). While its later tiles compute, the next panel is brought into the cache:
 * with three tiles or more there is time for it (with two it was slower; measured on Zen 5). */
static TARGET void FN(linear_panel)(const kf_linear_args *a, int64_t begin, int64_t end, int64_t panel, int fetch_next)
{
#define ALL(FETCH) {FN(linear_1_##FETCH), FN(linear_2_##FETCH), FN(linear_3_##FETCH), FN(linear_4_##FETCH), \
                    FN(linear_5_##FETCH), FN(linear_6_##FETCH)}
#if WIDE
    static void (*const tile[3][6])(const kf_linear_args *, int64_t, int64_t, const char *) = {ALL(0), ALL(1), ALL(2)};
#else
    static void (*const tile[1][6])(const kf_linear_args *, int64_t, int64_t, const char *) = {ALL(0)};
#endif
#undef ALL
    const int64_t panel_bytes = KF_PANEL * a->k * (int64_t)sizeof(T), tiles = (end - begin + 5) / 6;
    const char *ahead = (const char *)a->w.w + (panel + 1) * panel_bytes, *stop = ahead + (fetch_next ? panel_bytes : 0);
    const int lines = !WIDE || tiles < 3 ? 0 : tiles < 5 ? 2 : 1;
    for (int64_t row = begin; row < end;) {
        const int64_t left = end - row, rows = (left + (left + 5) / 6 - 1) / ((left + 5) / 6);
        const int fetch = row == begin || ahead >= stop ? 0 : lines;
        tile[fetch][rows - 1](a, row, panel, ahead);
        ahead += fetch * (a->k / GROUP) * 64;
        row += rows;
    }
}

static TARGET void FN(linear)(kf_worker *worker, const kf_linear_args *a)
{
    const int64_t columns = kf_is_gated(a->epilogue) ? (a->n + 31) / 32 * KF_PANEL : a->n;
    const int64_t panels = (columns + KF_PANEL - 1) / KF_PANEL;
    /* Long steps are cut by rows as well, so that the threads end together. */
    const int64_t blocks = a->rows > 2 * KF_ROW_BLOCK ? (a->rows + KF_ROW_BLOCK - 1) / KF_ROW_BLOCK : 1;
    const int64_t total = panels * blocks, grain = 1 + total / (16 * kf_team_threads(worker->team));
    for (int64_t unit, end; kf_next(worker, total, grain, &unit, &end);)
        for (; unit < end; unit++) {
            const int64_t panel = unit / blocks, block = unit % blocks;
            const int64_t first = block * a->rows / blocks, last = (block + 1) * a->rows / blocks;
            FN(linear_panel)(a, first, last, panel, panel + 1 < panels && block + 1 == blocks);
            kf_beat(worker);
        }
}
