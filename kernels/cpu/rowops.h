/* Operations on rows for one element type and one instruction set: norms, and the rotation. */

INL void FN(rms_norm_row)(const T *x, const float *weight, T *out, int64_t n, float eps, int wide, int add)
{
    VF acc[4];
    for (int j = 0; j < 4; j++)
        acc[j] = NAME(v_set1)(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        VF r = LDN(x + i, n - i);
        acc[(i / 16) & 3] = NAME(v_fma)(r, r, acc[(i / 16) & 3]);
    }
    VF sum = NAME(v_add)(NAME(v_add)(acc[0], acc[1]), NAME(v_add)(acc[2], acc[3]));
    VF inv = NAME(v_set1)(1.0f / sqrtf(NAME(v_hsum)(sum) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        VF r = NAME(v_mul)(LDN(x + i, n - i), inv);
        r = NAME(v_mul)(NAME(v_load_n)(weight + i, n - i), wide ? r : RND(r));
        STN(out + i, n - i, add ? NAME(v_add)(LDN(out + i, n - i), RND(r)) : r);
    }
}

static TARGET void FN(rms_norm)(kf_worker *worker, const kf_norm_args *a)
{
    for (int64_t row, end; kf_next(worker, a->rows, 8, &row, &end);)
        for (; row < end; row++)
            FN(rms_norm_row)((const T *)a->x + row * a->n, a->weight, (T *)a->out + row * a->n, a->n, a->eps, a->wide,
                             a->add);
}

static TARGET void FN(scale)(void *x, int64_t n, float scale)
{
    for (int64_t i = 0; i < n; i += 16)
        STN((T *)x + i, n - i, NAME(v_mul)(LDN((const T *)x + i, n - i), NAME(v_set1)(scale)));
}

static TARGET void FN(softcap)(kf_worker *worker, float *logits, int64_t n, float softcap)
{
    const VF cap = NAME(v_set1)(softcap);
    for (int64_t i, end; kf_next(worker, n, 4096, &i, &end);)
        for (; i < end; i += 16) {
            const VF x = NAME(v_div)(NAME(v_load_n)(logits + i, end - i), cap);
            NAME(v_store_n)(logits + i, end - i, NAME(v_mul)(NAME(v_tanh)(x), cap));
        }
}

/* One head: optional norm, rotation of its first values (the half-split form of Hugging Face), rounding to T. */
INL void FN(rope_head)(const T *x, const float *norm, float eps, int wide, const float *cos, const float *sin, int64_t hd,
                       int64_t rotated, T *dst)
{
    T normed[KF_HEAD_DIM_MAX];
    int64_t half = rotated / 2;
    if (norm) {
        FN(rms_norm_row)(x, norm, normed, hd, eps, wide, 0);
        x = normed;
    }
    for (int64_t i = 0; i < half; i += 16) {
        int64_t n = half - i;
        VF a = LDN(x + i, n), b = LDN(x + half + i, n);
        VF c = NAME(v_load_n)(cos + i, n), s = NAME(v_load_n)(sin + i, n);
        STN(dst + i, n, NAME(v_sub)(NAME(v_mul)(a, c), NAME(v_mul)(b, s)));
        STN(dst + half + i, n, NAME(v_add)(NAME(v_mul)(b, c), NAME(v_mul)(a, s)));
    }
    memcpy(dst + rotated, x + rotated, (size_t)(hd - rotated) * sizeof(T));
}

static TARGET void FN(rope_token)(const kf_rope_args *a, int64_t t)
{
    const kf_cache *kv = a->kv;
    const int64_t hd = kv->head_dim, bs = kv->block_size;
    const int64_t pos = a->step->positions[t], block = a->step->slots[t] / bs, off = a->step->slots[t] % bs;
    const T *qkv = (const T *)a->qkv + t * a->stride;
    const int64_t rotated = a->rotated;
    const float *c = a->cos + pos * (rotated / 2), *s = a->sin + pos * (rotated / 2);
    T key[KF_HEAD_DIM_MAX];
    for (int64_t h = 0; h < a->heads; h++)
        FN(rope_head)(qkv + h * hd, a->q_norm, a->eps, a->wide, c, s, hd, rotated, (T *)a->q + (t * a->heads + h) * hd);
    for (int64_t h = 0; h < kv->kv_heads; h++) {
        FN(rope_head)(qkv + (a->heads + h) * hd, a->k_norm, a->eps, a->wide, c, s, hd, rotated, key);
        T *k = (T *)kv->base + kf_head_at(kv, a->layer, h) + block * kv->to_block;
        for (int64_t d = 0; d < hd; d++)
            k[(d / GROUP * bs + off) * GROUP + d % GROUP] = key[d];
        memcpy(k + kv->to_values + off * hd, qkv + (a->heads + kv->kv_heads + h) * hd, (size_t)hd * sizeof(T));
    }
}

static TARGET void FN(rope_write)(kf_worker *worker, const kf_rope_args *a)
{
    for (int64_t t, end; kf_next(worker, a->step->tokens, 4, &t, &end);)
        for (; t < end; t++)
            FN(rope_token)(a, t);
}
