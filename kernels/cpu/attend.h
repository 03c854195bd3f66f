/* Paged attention for one element type and one instruction set.
 *
 * A tile is up to eight "virtual rows" (query rows of one sequence times the heads that share a kv head), so that
 * each key and value loaded serves all of them. Tiling never changes a row's arithmetic:
 *   score(t)  = fma over d = 0, 1, ...       (sixteen keys are the lanes of one vector)
 *   sum       = softmax() in common.h
 *   out(d)    = fma over t = start, start + 1, ...
 * A row never multiplies a key or value outside its own [start, end): those may be stale or NaN. */

/* VR rows by NC chunks of sixteen keys; VR and NC are constants at every call. */
INL void FN(scores)(const int VR, const int NC, const T *const *k, int64_t stride, const float *q, int64_t hd,
                    float *s, int64_t pad)
{
    VF acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < VR * NC; i++)
        acc[i] = NAME(v_set1)(0.0f);
    for (int64_t d = 0; d < hd; d++) {
        VF key[4];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++)
            key[c] = LD(k[c] + d * stride);
#pragma GCC unroll 8
        for (int r = 0; r < VR; r++)
#pragma GCC unroll 4
            for (int c = 0; c < NC; c++)
                acc[r * NC + c] = NAME(v_fma)(NAME(v_set1)(q[d * VR + r]), key[c], acc[r * NC + c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < VR; r++)
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++)
            NAME(v_store)(s + r * pad + c * 16, acc[r * NC + c]);
}

/* o[VR][DV vectors] += sum over t in [t0, t1) of p[VR][t] * V[t]; the last vector may be partial (n < 16). */
INL void FN(values)(const int VR, const int DV, const kf_tile *tile, const T *v, const float *p, int64_t t0,
                    int64_t t1, float *o, int64_t n)
{
    const int64_t bs = tile->block_size, hd = tile->head_dim;
    VF acc[16];
#pragma GCC unroll 8
    for (int r = 0; r < VR; r++)
#pragma GCC unroll 4
        for (int j = 0; j < DV; j++)
            acc[r * DV + j] = NAME(v_load)(o + r * tile->out_pad + 16 * j);
    while (t0 < t1) {
        const int64_t in_block = t0 % bs;
        const int64_t stop = t0 - in_block + bs < t1 ? t0 - in_block + bs : t1;
        const T *row = v + tile->table[t0 / bs] * tile->block_stride + in_block * hd;
        const float *pt = p + (t0 - tile->base);
        for (; t0 < stop; t0++, row += hd, pt++) {
            VF val[4];
#pragma GCC unroll 4
            for (int j = 0; j < DV; j++)
                val[j] = DV == 1 ? LDN(row, n) : LD(row + 16 * j);
#pragma GCC unroll 8
            for (int r = 0; r < VR; r++) {
                VF w = NAME(v_set1)(pt[r * tile->pad]);
#pragma GCC unroll 4
                for (int j = 0; j < DV; j++)
                    acc[r * DV + j] = NAME(v_fma)(w, val[j], acc[r * DV + j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < VR; r++)
#pragma GCC unroll 4
        for (int j = 0; j < DV; j++)
            NAME(v_store)(o + r * tile->out_pad + 16 * j, acc[r * DV + j]);
}

INL void FN(values_rows)(const int VR, const int DV, const kf_tile *tile, const T *v, const float *p, int64_t t0,
                         int64_t t1, float *o)
{
    int64_t d = 0;
    for (; d + 16 * DV <= tile->head_dim; d += 16 * DV)
        FN(values)(VR, DV, tile, v + d, p, t0, t1, o + d, 16);
    for (; d < tile->head_dim; d += 16)
        FN(values)(VR, 1, tile, v + d, p, t0, t1, o + d, tile->head_dim - d);
}

static TARGET void FN(values_any)(int vr, const kf_tile *tile, const T *v, const float *p, int64_t t0, int64_t t1,
                                  float *o)
{
    if (t0 >= t1)
        return;
    switch (vr) {
    case 1: FN(values_rows)(1, 4, tile, v, p, t0, t1, o); break;
    case 2: FN(values_rows)(2, 4, tile, v, p, t0, t1, o); break;
    case 4: FN(values_rows)(4, WIDE ? 4 : 1, tile, v, p, t0, t1, o); break;
    default: FN(values_rows)(8, WIDE ? 2 : 1, tile, v, p, t0, t1, o); break;
    }
}

/* Copies the sixteen keys from position t on into tmp[head_dim][16], for block sizes that are no multiple of 16. */
static TARGET void FN(gather)(const kf_tile *tile, const T *k, int64_t t, T *tmp)
{
    const int64_t bs = tile->block_size, hd = tile->head_dim;
    memset(tmp, 0, (size_t)hd * 16 * sizeof(T));
    for (int64_t j = 0; j < 16 && t + j < tile->end; j++) {
        const T *key = k + tile->table[(t + j) / bs] * tile->block_stride + (t + j) % bs;
        for (int64_t d = 0; d < hd; d++)
            tmp[d * 16 + j] = key[d * bs];
    }
}

static TARGET void FN(scores_any)(int vr, const kf_tile *tile, const T *k, const float *q, float *s)
{
    const int64_t bs = tile->block_size, hd = tile->head_dim, chunks = (tile->end - tile->base + 15) / 16;
    const int step = vr <= 2 ? 4 : vr == 4 ? 2 : 1;
    T tmp[KF_HEAD_DIM_MAX * 16];
    for (int64_t c = 0; c < chunks;) {
        const T *at[4];
        int n = chunks - c >= step && bs % 16 == 0 ? step : 1;
        int64_t stride = bs;
        for (int i = 0; i < n; i++) {
            int64_t t = tile->base + (c + i) * 16;
            at[i] = k + tile->table[t / bs] * tile->block_stride + t % bs;
        }
        if (bs % 16) {
            FN(gather)(tile, k, tile->base + c * 16, tmp);
            at[0] = tmp;
            stride = 16;
        }
        float *out = s + c * 16;
        switch (vr * 8 + n) {
        case 8 + 4: FN(scores)(1, 4, at, stride, q, hd, out, tile->pad); break;
        case 8 + 1: FN(scores)(1, 1, at, stride, q, hd, out, tile->pad); break;
        case 16 + 4: FN(scores)(2, 4, at, stride, q, hd, out, tile->pad); break;
        case 16 + 1: FN(scores)(2, 1, at, stride, q, hd, out, tile->pad); break;
        case 32 + 2: FN(scores)(4, 2, at, stride, q, hd, out, tile->pad); break;
        case 32 + 1: FN(scores)(4, 1, at, stride, q, hd, out, tile->pad); break;
        default: FN(scores)(8, 1, at, stride, q, hd, out, tile->pad); break;
        }
        c += n;
    }
}

/* One tile: `queries` consecutive queries from position `pos` on, `group` heads each. q and out point at the
 * first query's first head of the group; rows are `row_stride` elements apart. */
static TARGET void FN(attend_tile)(kf_tile *tile, const T *k, const T *v, const T *q, T *out, int64_t row_stride,
                                   int64_t pos, int queries, int group, float scale, int64_t window, float *scratch)
{
    const int64_t hd = tile->head_dim;
    const int real = queries * group, vr = real <= 2 ? real : real <= 4 ? 4 : 8;
    const int64_t first_start = START(pos, window), last_start = START(pos + queries - 1, window);
    tile->base = first_start / 16 * 16;
    tile->end = pos + queries;
    tile->pad = (tile->end - tile->base + 15) / 16 * 16;
    float *qt = scratch, *o = qt + 8 * hd, *s = o + 8 * tile->out_pad, sums[8];

    for (int r = 0; r < vr; r++)
        for (int64_t d = 0; d < hd; d++)
            qt[d * vr + r] = r < real ? TO_FLOAT(q[(r / group) * row_stride + (r % group) * hd + d]) * scale : 0.0f;
    memset(o, 0, (size_t)(vr * tile->out_pad) * sizeof *o);
    FN(scores_any)(vr, tile, k, qt, s);
    for (int r = 0; r < real; r++) {
        int64_t p = pos + r / group;
        sums[r] = NAME(softmax)(s + r * tile->pad, START(p, window) - tile->base, p + 1 - tile->base);
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

static TARGET void FN(attention)(const kf_cache *kv, int64_t layer, const kf_step *step, const void *q_any,
                                 void *out_any, int64_t heads, float scale, int64_t window, float *scratch)
{
    const T *q = q_any;
    T *out = out_any;
    const int64_t hd = kv->head_dim, bs = kv->block_size, plane = kv->kv_heads * bs * hd;
    const int64_t group = heads / kv->kv_heads, row_stride = heads * hd;
    kf_tile tile = {.block_size = bs, .head_dim = hd, .block_stride = kv->layers * 2 * plane,
                    .out_pad = (hd + 15) / 16 * 16};
    for (int64_t b = 0; b < step->rows; b++) {
        const int64_t begin = step->cu_q[b], nq = step->cu_q[b + 1] - begin, first = step->context_lens[b] - nq;
        tile.table = step->tables + b * step->width;
        for (int64_t h = 0; h < kv->kv_heads; h++) {
            const T *k = (const T *)kv->base + layer * 2 * plane + h * bs * hd;
            for (int64_t g = 0; g < group; g += 8) {
                const int gn = group - g < 8 ? (int)(group - g) : 8;
                const int64_t per = 8 / gn, at = begin * row_stride + (h * group + g) * hd;
                for (int64_t i = 0; i < nq; i += per)
                    FN(attend_tile)(&tile, k, k + plane, q + at + i * row_stride, out + at + i * row_stride, row_stride,
                                    first + i, (int)(nq - i < per ? nq - i : per), gn, scale, window, scratch);
            }
        }
    }
}

static const kf_ops FN(ops) = {FN(attention), FN(rope_write), FN(add_rms_norm), FN(silu_mul), FN(linear)};
