/* Paged attention for one element type and one instruction set.
 *
 * A tile is up to twelve "virtual rows" (query rows of one sequence times the heads that share a kv head), so that
 * each key and value loaded serves all of them. Tiling never changes a row's arithmetic:
 *   score(t)  = DOT over groups of d = 0, 1, ...  (sixteen keys are the lanes of one vector)
 *   sum       = softmax() in common.h
 *   out(d)    = fma over t = start, start + 1, ...
 * A row never multiplies a value outside its own [start, end): that may be stale or NaN. */

/* VR rows by NC chunks of sixteen keys; VR, NC and FETCH are constants at every call. q: [groups][VR][GROUP].
 * FETCH: a cache line of the next chunks' keys (next_k) and of these chunks' values (v) is asked for with each group of d.
 * Blocks lie far apart, so the processor does not see them coming. */
INL void FN(scores)(const int VR, const int NC, const int FETCH, const T *const *k, const T *const *next_k,
                    const T *const *v, int64_t stride, const T *q, int64_t hd, float *s, int64_t pad)
{
    VF acc[24];
UNROLL(24)
    for (int i = 0; i < VR * NC; i++)
        acc[i] = NAME(v_set1)(0.0f);
    for (int64_t d = 0; d < hd / GROUP; d++) {
        VG key[4];
UNROLL(4)
        for (int c = 0; c < NC; c++)
            key[c] = LDG(k[c] + d * stride);
UNROLL(4)
        for (int c = 0; c < NC && FETCH; c++) {
            __builtin_prefetch(next_k[c] + d * stride);
            __builtin_prefetch((const char *)v[c] + d * 64);
        }
UNROLL(12)
        for (int r = 0; r < VR; r++) {
            VG query = SETG(q + (d * VR + r) * GROUP);
UNROLL(4)
            for (int c = 0; c < NC; c++)
                acc[r * NC + c] = DOT(query, key[c], acc[r * NC + c]);
        }
    }
UNROLL(12)
    for (int r = 0; r < VR; r++)
UNROLL(4)
        for (int c = 0; c < NC; c++)
            NAME(v_store)(s + r * pad + c * 16, acc[r * NC + c]);
}

/* o[VR][DV vectors] += sum over t in [t0, t1) of p[VR][t] * V[t]; the last vector may be partial (n < 16).
 * FETCH: on the way, what the next unit of work will read is brought into the cache, as many bytes as are read here. */
INL void FN(values)(const int VR, const int DV, const int FETCH, const kf_tile *tile, const T *v, const float *p,
                    int64_t t0, int64_t t1, float *o, int64_t n)
{
    const int64_t bs = tile->block_size, hd = tile->head_dim;
    VF acc[24];
UNROLL(12)
    for (int r = 0; r < VR; r++)
UNROLL(4)
        for (int j = 0; j < DV; j++)
            acc[r * DV + j] = NAME(v_load)(o + r * tile->out_pad + 16 * j);
    while (t0 < t1) {
        const int64_t in_block = t0 % bs;
        const int64_t stop = t0 - in_block + bs < t1 ? t0 - in_block + bs : t1;
        const T *row = v + tile->table[t0 / bs] * tile->block_stride + in_block * hd;
        const float *pt = p + (t0 - tile->base);
        const char *next = NULL;
        if (FETCH && t0 < tile->next_end)
            next = (const char *)(tile->next_k + (tile->next_table[t0 / bs] * tile->block_stride + in_block * hd) * (int64_t)sizeof(T));
        for (; t0 < stop; t0++, row += hd, pt++) {
            if (FETCH && next) {
                for (int64_t b = 0; b < hd * (int64_t)sizeof(T); b += 64) {
                    __builtin_prefetch(next + b, 0, 2);
                    __builtin_prefetch(next + b + tile->plane_bytes, 0, 2);
                }
                next += hd * (int64_t)sizeof(T);
            }
            VF val[4];
UNROLL(4)
            for (int j = 0; j < DV; j++)
                val[j] = DV == 1 ? LDN(row, n) : LD(row + 16 * j);
UNROLL(12)
            for (int r = 0; r < VR; r++) {
                VF w = NAME(v_set1)(pt[r * tile->pad]);
UNROLL(4)
                for (int j = 0; j < DV; j++)
                    acc[r * DV + j] = NAME(v_fma)(w, val[j], acc[r * DV + j]);
            }
        }
    }
UNROLL(12)
    for (int r = 0; r < VR; r++)
UNROLL(4)
        for (int j = 0; j < DV; j++)
            NAME(v_store)(o + r * tile->out_pad + 16 * j, acc[r * DV + j]);
}

INL void FN(values_rows)(const int VR, const int DV, const kf_tile *tile, const T *v, const float *p, int64_t t0,
                         int64_t t1, float *o)
{
    int64_t d = 0;
    if (VR <= 6 && DV == 4 && tile->head_dim >= 64) {
        FN(values)(VR, DV, 1, tile, v, p, t0, t1, o, 16);
        d = 64;
    }
    for (; d + 16 * DV <= tile->head_dim; d += 16 * DV)
        FN(values)(VR, DV, 0, tile, v + d, p, t0, t1, o + d, 16);
    for (; d < tile->head_dim; d += 16)
        FN(values)(VR, 1, 0, tile, v + d, p, t0, t1, o + d, tile->head_dim - d);
}

static TARGET void FN(values_any)(int vr, const kf_tile *tile, const T *v, const float *p, int64_t t0, int64_t t1,
                                  float *o)
{
    if (t0 >= t1)
        return;
    switch (vr) {
    case 1: FN(values_rows)(1, 4, tile, v, p, t0, t1, o); break;
    case 2: FN(values_rows)(2, 4, tile, v, p, t0, t1, o); break;
    case 3: FN(values_rows)(3, WIDE ? 4 : 2, tile, v, p, t0, t1, o); break;
    case 4: FN(values_rows)(4, WIDE ? 4 : 1, tile, v, p, t0, t1, o); break;
    case 6: FN(values_rows)(6, WIDE ? 4 : 1, tile, v, p, t0, t1, o); break;
    case 8: FN(values_rows)(8, WIDE ? 2 : 1, tile, v, p, t0, t1, o); break;
    default: FN(values_rows)(12, WIDE ? 2 : 1, tile, v, p, t0, t1, o); break;
    }
}

/* Copies the sixteen keys from position t on into tmp[groups][16][GROUP], for block sizes that are no multiple of 16. */
static TARGET void FN(gather)(const kf_tile *tile, const T *k, int64_t t, T *tmp)
{
    const int64_t bs = tile->block_size, hd = tile->head_dim;
    memset(tmp, 0, (size_t)hd * 16 * sizeof(T));
    for (int64_t j = 0; j < 16 && t + j < tile->end; j++) {
        const T *key = k + tile->table[(t + j) / bs] * tile->block_stride + (t + j) % bs * GROUP;
        for (int64_t d = 0; d < hd / GROUP; d++)
            memcpy(tmp + (d * 16 + j) * GROUP, key + d * bs * GROUP, GROUP * sizeof(T));
    }
}

INL const T *FN(chunk)(const kf_tile *tile, const T *k, int64_t index)
{
    const int64_t t = tile->base + index * 16, bs = tile->block_size;
    return k + tile->table[t / bs] * tile->block_stride + t % bs * GROUP;
}

static TARGET void FN(scores_any)(int vr, const kf_tile *tile, const T *k, const T *v, const T *q, float *s)
{
    const int64_t bs = tile->block_size, hd = tile->head_dim, chunks = (tile->end - tile->base + 15) / 16;
    const int step = vr <= 4 ? 4 : WIDE ? (vr == 6 ? 4 : 2) : 1;
    T tmp[KF_HEAD_DIM_MAX * 16];
    for (int64_t c = 0; c < chunks;) {
        const T *at[4], *next[4], *values[4];
        int n = chunks - c >= step && bs % 16 == 0 ? step : 1;
        int64_t stride = bs * GROUP;
        for (int i = 0; i < n; i++) {
            at[i] = FN(chunk)(tile, k, c + i);
            next[i] = FN(chunk)(tile, k, c + i + n < chunks ? c + i + n : c + i);
            values[i] = v + (at[i] - k) + (tile->base + (c + i) * 16) % bs * (hd - GROUP);
        }
        if (bs % 16) {
            FN(gather)(tile, k, tile->base + c * 16, tmp);
            at[0] = next[0] = tmp;
            stride = 16 * GROUP;
        }
        float *out = s + c * 16;
#define CASE(VR, NC) \
    case VR * 8 + NC: \
        FN(scores)(VR, NC, VR <= 6 && NC == 4, at, next, values, stride, q, hd, out, tile->pad); \
        break;
        switch (vr * 8 + n) {
            CASE(1, 4) CASE(1, 1) CASE(2, 4) CASE(2, 1) CASE(3, 4) CASE(3, 1) CASE(4, 4) CASE(4, 1)
            CASE(6, 4) CASE(6, 1) CASE(8, 2) CASE(8, 1) CASE(12, 2) CASE(12, 1)
        }
#undef CASE
        c += n;
    }
}

/* One tile: `queries` consecutive queries from position `pos` on, `group` heads each. q and out point at the
 * first query's first head of the group; rows are `row_stride` elements apart. */
static TARGET void FN(attend_tile)(kf_tile *tile, const T *k, const T *v, const T *q, T *out, int64_t row_stride,
                                   int64_t pos, int queries, int group, float scale, int64_t window, float *scratch)
{
    const int64_t hd = tile->head_dim;
    const int real = queries * group, vr = real <= 4 ? real : real <= 6 ? 6 : real <= 8 ? 8 : 12;
    const int64_t first_start = START(pos, window), last_start = START(pos + queries - 1, window);
    tile->base = first_start / 16 * 16;
    tile->end = pos + queries;
    tile->pad = (tile->end - tile->base + 15) / 16 * 16;
    T *qt = (T *)scratch;
    float *o = scratch + KF_TILE_ROWS * hd, *s = o + KF_TILE_ROWS * tile->out_pad, sums[KF_TILE_ROWS];

    for (int r = 0; r < vr; r++)
        for (int64_t d = 0; d < hd; d++)
            qt[(d / GROUP * vr + r) * GROUP + d % GROUP] =
                r < real ? q[(r / group) * row_stride + (r % group) * hd + d] : (T)0;
    memset(o, 0, (size_t)(vr * tile->out_pad) * sizeof *o);
    FN(scores_any)(vr, tile, k, v, qt, s);
    for (int r = 0; r < real; r++) {
        int64_t p = pos + r / group;
        sums[r] = NAME(softmax)(s + r * tile->pad, START(p, window) - tile->base, p + 1 - tile->base, scale);
    }
    /* Keys that every row sees go together; before and after them, each row alone. */
    const int64_t shared_end = pos + 1 > last_start ? pos + 1 : last_start;
    for (int r = 0; r < real; r++) {
        int64_t p = pos + r / group, stop = last_start < p + 1 ? last_start : p + 1;
        FN(values_any)(1, tile, v, s + r * tile->pad, START(p, window), stop, o + r * tile->out_pad);
    }
    FN(values_any)(vr, tile, v, s, last_start, shared_end, o);
    for (int r = 0; r < real; r++) {
        int64_t p = pos + r / group;
        FN(values_any)(1, tile, v, s + r * tile->pad, shared_end, p + 1, o + r * tile->out_pad);
        T *dst = out + (r / group) * row_stride + (r % group) * hd;
        VF inv = NAME(v_set1)(1.0f / sums[r]);
        for (int64_t d = 0; d < hd; d += 16)
            STN(dst + d, hd - d, NAME(v_mul)(NAME(v_load)(o + r * tile->out_pad + d), inv));
    }
}

/* Queries [from, to) of one sequence that begin at row `begin` of q, for one kv head. */
static TARGET void FN(attend_head)(const kf_attention_args *a, kf_tile *tile, int64_t head, int64_t begin, int64_t from,
                                   int64_t to, int64_t first, kf_worker *worker)
{
    float *scratch = worker->scratch;
    const kf_cache *kv = a->kv;
    const int64_t hd = kv->head_dim, group = a->heads / kv->kv_heads, stride = a->heads * hd;
    const T *k = (const T *)kv->base + kf_head_at(kv, a->layer, head), *v = k + kv->to_values;
    for (int64_t g = 0; g < group; g += KF_TILE_ROWS) {
        const int heads = group - g < KF_TILE_ROWS ? (int)(group - g) : KF_TILE_ROWS;
        const int64_t per = KF_TILE_ROWS / heads, at = begin * stride + (head * group + g) * hd;
        for (int64_t i = from; i < to; i += per) {
            FN(attend_tile)(tile, k, v, (const T *)a->q + at + i * stride, (T *)a->out + at + i * stride, stride,
                            first + i, (int)(to - i < per ? to - i : per), heads, a->scale, a->window, scratch);
            kf_beat(worker);
        }
    }
}

/* A unit of work is one kv head of up to KF_QUERY_BLOCK queries of one sequence: (row, head, block of queries). */
INL void FN(seek)(const kf_attention_args *a, kf_unit *u, int64_t unit)
{
    for (; unit - u->base >= query_blocks(a->step, u->row) * a->kv->kv_heads; u->row++)
        u->base += query_blocks(a->step, u->row) * a->kv->kv_heads;
    const int64_t blocks = query_blocks(a->step, u->row);
    u->head = (unit - u->base) / blocks;
    u->block = (unit - u->base) % blocks;
}

static TARGET void FN(attention)(kf_worker *worker, const kf_attention_args *a)
{
    const kf_cache *kv = a->kv;
    const kf_step *step = a->step;
    const int64_t hd = kv->head_dim;
    kf_tile tile = {.block_size = kv->block_size, .head_dim = hd, .block_stride = kv->to_block,
                    .plane_bytes = kv->to_values * (int64_t)sizeof(T), .out_pad = (hd + 15) / 16 * 16};
    int64_t total = 0;
    for (int64_t b = 0; b < step->rows; b++)
        total += query_blocks(step, b) * kv->kv_heads;
    const int64_t grain = 1 + total / (8 * kf_team_threads(worker->team));
    kf_unit here = {0}, next = {0};
    for (int64_t unit, end; kf_next(worker, total, grain, &unit, &end);)
        for (; unit < end; unit++) {
            FN(seek)(a, &here, unit);
            tile.next_end = 0;
            if (unit + 1 < end) {
                FN(seek)(a, &next, unit + 1);
                tile.next_table = step->tables + next.row * step->width;
                tile.next_k = (const char *)kv->base + kf_head_at(kv, a->layer, next.head) * (int64_t)sizeof(T);
                tile.next_end = step->context_lens[next.row];
                if (tile.next_end * hd * 2 * (int64_t)sizeof(T) > KF_FETCH_BYTES || next.block > 0)
                    tile.next_end = 0;
            }
            const int64_t begin = step->cu_q[here.row], queries = step->cu_q[here.row + 1] - begin;
            const int64_t from = here.block * KF_QUERY_BLOCK, to = from + KF_QUERY_BLOCK;
            tile.table = step->tables + here.row * step->width;
            FN(attend_head)(a, &tile, here.head, begin, from, to < queries ? to : queries,
                            step->context_lens[here.row] - queries, worker);
        }
}

static const kf_ops FN(ops) = {FN(attention), FN(rope_write), FN(rms_norm), FN(linear),
                                 FN(linear_panel), FN(route), FN(combine), FN(scale), FN(softcap), FN(fixed_finish)};
