/* x W^T of quantised weights for bfloat16 rows and one instruction set.
 *
 * Rows are rounded to eight bits first, each group of 32 inputs with a scale of its own: the sum of a group is one of
 * integers, exact. Each output is then
 *   fma(the group's sum, scale of the weight * scale of x, acc), with a min also fma(min, sum of x, acc),
 * group by group (where groups share a scale: their sums times the scales of x first, then once for all of them), whatever tile of rows it is computed in: the bits of a row do not depend on the other rows. */

/* One group of VR prepared rows by NC vectors: sums[r * NC + c] = sum of x (q - offset). */
INL void FN(q_group)(const int F, const int VR, const int NC, const char *x, int64_t stride, const uint8_t *p,
                     const kf_group *info, VF *sums)
{
    VP acc[16];
UNROLL(4)
    for (int r = 0; r < VR; r++) {
        const kf_group *of = (const kf_group *)((const char *)info + r * stride);
UNROLL(4)
        for (int c = 0; c < NC; c++)
            acc[r * NC + c] = Q_IS8(F) ? NAME(q8_begin)(-128 * of->total) : NAME(q4_begin)(-Q_OFFSET(F) * of->total);
    }
UNROLL(8)
    for (int quad = 0; quad < 8; quad += Q_IS8(F) ? 1 : 2) {
        VQ w8[4];
        VP low[4], high[4];
UNROLL(4)
        for (int c = 0; c < NC; c++) {
            const VP w = NAME(q_load)(p + (quad / (Q_IS8(F) ? 1 : 2) * KF_PANEL + 16 * c) * 4);
            if (Q_IS8(F))
                w8[c] = NAME(q8_weights)(w);
            else {
                low[c] = NAME(q_low)(w);
                high[c] = NAME(q_high)(w);
            }
        }
UNROLL(4)
        for (int r = 0; r < VR; r++) {
            const int8_t *of = (const int8_t *)(x + r * stride) + 4 * quad;
            const VP first = NAME(q_quad)(of);
UNROLL(4)
            for (int c = 0; c < NC; c++)
                acc[r * NC + c] = Q_IS8(F) ? NAME(q8_step)(first, w8[c], acc[r * NC + c])
                                           : NAME(q4_step)(first, low[c], acc[r * NC + c]);
            if (Q_IS8(F))
                continue;
            const VP second = NAME(q_quad)(of + 4);
UNROLL(4)
            for (int c = 0; c < NC; c++)
                acc[r * NC + c] = NAME(q4_step)(second, high[c], acc[r * NC + c]);
        }
    }
UNROLL(4)
    for (int r = 0; r < VR; r++) {
        const kf_group *of = (const kf_group *)((const char *)info + r * stride);
UNROLL(4)
        for (int c = 0; c < NC; c++)
            sums[r * NC + c] = NAME(q_floats)(
                Q_IS8(F) ? acc[r * NC + c] : NAME(q4_end)(acc[r * NC + c], -Q_OFFSET(F) * of->total));
    }
}

/* Adds up VR prepared rows by NC vectors of one panel, whose first is c0; VR, NC and the format F are constants at every
 * call. On the way, `fetch` cache lines a group are asked for from `ahead` on. */
INL void FN(q_sums)(const int F, const int VR, const int NC, int c0, const char *x, int64_t groups, int64_t span,
                    const uint8_t *p, const char *ahead, int fetch, VF *acc)
{
    const int64_t info_at = groups * KF_QGROUP;
    const int64_t stride = info_at + groups * (int64_t)sizeof(kf_group);
    const float *row_scales = (const float *)p + 16 * c0;
    VF s[4], m[4], ds[4], dm[4], sums[16], part[16]; /* part, left: of groups that share a scale */
    float left[4] = {0};
UNROLL(4)
    for (int c = 0; c < 4; c++)
        s[c] = m[c] = ds[c] = dm[c] = NAME(v_set1)(0.0f);
UNROLL(16)
    for (int i = 0; i < VR * NC; i++)
        acc[i] = part[i] = NAME(v_set1)(0.0f);
    if (F == KF_INT8_ROW)
        p += KF_SCALES_BYTES;
    for (int64_t g = 0; g < groups; g++) {
        p = NAME(q_scales)(F, NC, c0, g, span, p, s, m, ds, dm);
        const kf_group *info = (const kf_group *)(x + info_at) + g;
        const char *values = x + g * KF_QGROUP;
        FN(q_group)(F, VR, NC, values, stride, p + 16 * c0 * 4, info, sums);
        for (int i = 0; i < fetch; i++)
            __builtin_prefetch(ahead + (g * fetch + i) * 64, 0, 2);
        const int spans = F == KF_INT4_F32_MIN, ends = spans && ((g + 1) % span == 0 || g + 1 == groups);
UNROLL(4)
        for (int r = 0; r < VR; r++) {
            const kf_group *of = (const kf_group *)((const char *)info + r * stride);
            const VF scale = NAME(v_set1)(of->scale), sum = NAME(v_set1)(spans ? left[r] + of->sum : of->sum);
            left[r] = ends ? 0.0f : left[r] + of->sum;
UNROLL(4)
            for (int c = 0; c < NC; c++) {
                const int i = r * NC + c;
                if (spans) {
                    part[i] = NAME(v_fma)(sums[i], scale, part[i]);
                    if (ends) {
                        acc[i] = NAME(v_fma)(m[c], sum, NAME(v_fma)(part[i], s[c], acc[i]));
                        part[i] = NAME(v_set1)(0.0f);
                    }
                    continue;
                }
                if (F == KF_INT8_ROW)
                    acc[i] = NAME(v_fma)(sums[i], scale, acc[i]);
                else
                    acc[i] = NAME(v_fma)(sums[i], NAME(v_mul)(s[c], scale), acc[i]);
                if (Q_HAS_MIN(F))
                    acc[i] = NAME(v_fma)(m[c], sum, acc[i]);
            }
        }
        p += Q_VALUE_BYTES(F);
    }
    if (F == KF_INT8_ROW) {
UNROLL(16)
        for (int i = 0; i < VR * NC; i++)
            acc[i] = NAME(v_mul)(acc[i], NAME(v_load)(row_scales + 16 * (i % NC)));
    }
}

/* VR rows of one panel, as many of its vectors at a time as fill the registers. */
INL void FN(q_tile)(const int F, const int VR, const kf_linear_args *a, int64_t row, int64_t panel, const char *ahead,
                    int fetch)
{
    const int NC = WIDE || VR == 1 ? 4 : VR == 2 ? 2 : 1;
    const int64_t groups = kf_groups(a->k);
    const char *x = (const char *)a->prepared + row * kf_prepared_bytes(a->k);
    const uint8_t *p = (const uint8_t *)a->w.w + panel * kf_panel_bytes(F, groups, a->w.span);
    VF sums[4 * 4], some[4 * 4];
UNROLL(4)
    for (int c = 0; c < 4; c += NC) {
        FN(q_sums)(F, VR, NC, c, x, groups, a->w.span, p, ahead, c ? 0 : fetch, some);
UNROLL(4)
        for (int r = 0; r < VR; r++)
UNROLL(4)
            for (int j = 0; j < NC; j++)
                sums[r * 4 + c + j] = some[r * NC + j];
    }
    for (int r = 0; r < VR; r++)
        if (kf_is_gated(a->epilogue))
            FN(gated_finish)(a, sums + r * 4, row + r, panel);
        else
            FN(linear_finish)(a, sums + r * 4, row + r, panel);
}

#define TILE(F, VR)                                                                                              \
    static TARGET void FN(q_##F##_##VR)(const kf_linear_args *a, int64_t row, int64_t panel, const char *ahead, \
                                        int fetch)                                                               \
    {                                                                                                            \
        FN(q_tile)(F, VR, a, row, panel, ahead, fetch);                                                          \
    }
#define TILES(F) TILE(F, 1) TILE(F, 2) TILE(F, 4)
TILES(KF_INT8_ROW) TILES(KF_INT8_F16) TILES(KF_INT4_F16) TILES(KF_INT4_F16_MIN) TILES(KF_INT4_F32_MIN) TILES(KF_INT4_K)
#undef TILES
#undef TILE

/* One panel for the rows [begin, end). While its later tiles compute, the next panel is brought into the cache. */
static TARGET void FN(q_panel)(const kf_linear_args *a, int64_t begin, int64_t end, int64_t panel, int fetch_next)
{
#define ALL(F) {FN(q_##F##_1), FN(q_##F##_2), FN(q_##F##_4)}
    static void (*const tiles[][3])(const kf_linear_args *, int64_t, int64_t, const char *, int) = {
        ALL(KF_INT8_ROW), ALL(KF_INT8_F16), ALL(KF_INT4_F16), ALL(KF_INT4_F16_MIN), ALL(KF_INT4_F32_MIN), ALL(KF_INT4_K)};
#undef ALL
    const int64_t groups = kf_groups(a->k), bytes = kf_panel_bytes(a->w.format, groups, a->w.span);
    const char *ahead = (const char *)a->w.w + (panel + 1) * bytes;
    int64_t later = (end - begin + 3) / 4 - 1, lines = (bytes / 64 + groups - 1) / groups;
    if (!fetch_next)
        lines = 0;
    for (int64_t row = begin; row < end;) {
        const int64_t left = end - row;
        const int size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        const int64_t fetch = row == begin || later < 1 ? 0 : (lines + later - 1) / later;
        tiles[a->w.format - KF_INT8_ROW][size](a, row, panel, ahead, (int)fetch);
        if (fetch) {
            ahead += fetch * groups * 64;
            lines -= fetch;
            later--;
        }
        row += 1 << size;
    }
}

static TARGET void FN(q_linear)(kf_worker *worker, const kf_linear_args *a)
{
    const int64_t columns = kf_is_gated(a->epilogue) ? (a->n + 31) / 32 * KF_PANEL : a->n;
    const int64_t panels = (columns + KF_PANEL - 1) / KF_PANEL;
    const int64_t blocks = a->rows > 2 * KF_ROW_BLOCK ? (a->rows + KF_ROW_BLOCK - 1) / KF_ROW_BLOCK : 1;
    const int64_t total = panels * blocks, grain = 1 + total / (16 * kf_team_threads(worker->team));
    for (int64_t unit, end; kf_next(worker, total, grain, &unit, &end);)
        for (; unit < end; unit++) {
            const int64_t panel = unit / blocks, block = unit % blocks;
            const int64_t first = block * a->rows / blocks, last = (block + 1) * a->rows / blocks;
            FN(q_panel)(a, first, last, panel, panel + 1 < panels && block + 1 == blocks);
            kf_beat(worker);
        }
}

/* One group: values, scale and sums. A group with a number that is not finite becomes one, so that its row does. */
INL void FN(prepare_group)(const T *from, int64_t n, int8_t *q, kf_group *info)
{
    float x[KF_QGROUP];
    NAME(v_store)(x, n > 0 ? LDN(from, n) : NAME(v_set1)(0.0f));
    NAME(v_store)(x + 16, n > 16 ? LDN(from + 16, n - 16) : NAME(v_set1)(0.0f));
    int32_t bits[KF_QGROUP], most = 0, total = 0;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < KF_QGROUP; i++)
        most = (bits[i] & 0x7FFFFFFF) > most ? bits[i] & 0x7FFFFFFF : most;
    const int finite = most < 0x7F800000, some = finite && most >= 0x0F800000; /* 2^-96: what is less counts as nothing */
    float largest;
    memcpy(&largest, &most, sizeof largest);
    const float inverse = some ? 127.0f / largest : 0.0f;
    for (int i = 0; i < KF_QGROUP; i++) {
        const float rounded = (some ? x[i] * inverse : 0.0f) + 0x1.8p23f; /* the integer is in the low bits */
        int32_t value;
        memcpy(&value, &rounded, sizeof value);
        value -= 0x4B400000;
        q[i] = (int8_t)value;
        total += value;
    }
    info->scale = finite ? some ? largest / 127.0f : 0.0f : NAN;
    info->total = total;
    info->sum = info->scale * (float)total;
    info->unused = 0;
}

static TARGET void FN(q_prepare)(kf_worker *worker, const kf_linear_args *a)
{
    const int64_t groups = kf_groups(a->k);
    for (int64_t row, end; kf_next(worker, a->rows, 4, &row, &end);)
        for (; row < end; row++) {
            char *to = (char *)a->prepared + row * kf_prepared_bytes(a->k);
            kf_group *info = (kf_group *)(to + groups * KF_QGROUP);
            for (int64_t g = 0; g < groups; g++)
                FN(prepare_group)((const T *)a->x + row * a->k + g * KF_QGROUP, a->k - g * KF_QGROUP, (int8_t *)to + g * KF_QGROUP,
                                  info + g);
        }
}
