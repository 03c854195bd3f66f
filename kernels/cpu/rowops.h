/* Per-row operations and the rotation for one element type and one instruction set. */

static TARGET void FN(add_rms_norm)(const void *x_any, void *residual_any, const void *weight_any, void *out_any,
                                    int64_t rows, int64_t n, float eps)
{
    const T *x = x_any, *weight = weight_any;
    T *residual = residual_any, *out = out_any;
    for (int64_t row = 0; row < rows; row++, residual += n) {
        VF acc[4];
        for (int j = 0; j < 4; j++)
            acc[j] = NAME(v_set1)(0.0f);
        for (int64_t i = 0; i < n; i += 16) {
            VF r = LDN(residual + i, n - i);
            if (x) {
                r = RND(NAME(v_add)(LDN(x + row * n + i, n - i), r));
                STN(residual + i, n - i, r);
            }
            acc[(i / 16) & 3] = NAME(v_fma)(r, r, acc[(i / 16) & 3]);
        }
        if (!out)
            continue;
        VF sum = NAME(v_add)(NAME(v_add)(acc[0], acc[1]), NAME(v_add)(acc[2], acc[3]));
        VF inv = NAME(v_set1)(1.0f / sqrtf(NAME(v_hsum)(sum) / (float)n + eps));
        for (int64_t i = 0; i < n; i += 16) {
            VF r = RND(NAME(v_mul)(LDN(residual + i, n - i), inv));
            STN(out + row * n + i, n - i, NAME(v_mul)(LDN(weight + i, n - i), r));
        }
    }
}

static TARGET void FN(silu_mul)(const void *x_any, void *out_any, int64_t rows, int64_t n)
{
    const T *x = x_any;
    T *out = out_any;
    const VF zero = NAME(v_set1)(0.0f), one = NAME(v_set1)(1.0f);
    for (int64_t row = 0; row < rows; row++, x += 2 * n, out += n)
        for (int64_t i = 0; i < n; i += 16) {
            VF g = LDN(x + i, n - i);
            VF s = NAME(v_div)(g, NAME(v_add)(one, NAME(v_exp)(NAME(v_sub)(zero, g))));
            STN(out + i, n - i, NAME(v_mul)(RND(s), LDN(x + n + i, n - i)));
        }
}

/* One head: optional norm, rotation (the half-split form of Hugging Face), rounding to T. */
INL void FN(rope_head)(const T *x, const T *norm, float eps, const float *cos, const float *sin, int64_t hd, T *dst)
{
    T normed[KF_HEAD_DIM_MAX];
    int64_t half = hd / 2;
    if (norm) {
        memcpy(normed, x, (size_t)hd * sizeof(T));
        FN(add_rms_norm)(NULL, normed, norm, normed, 1, hd, eps);
        x = normed;
    }
    for (int64_t i = 0; i < half; i += 16) {
        int64_t n = half - i;
        VF a = LDN(x + i, n), b = LDN(x + half + i, n);
        VF c = NAME(v_load_n)(cos + i, n), s = NAME(v_load_n)(sin + i, n);
        STN(dst + i, n, NAME(v_sub)(NAME(v_mul)(a, c), NAME(v_mul)(b, s)));
        STN(dst + half + i, n, NAME(v_add)(NAME(v_mul)(b, c), NAME(v_mul)(a, s)));
    }
}

static TARGET int FN(rope_write)(const kf_cache *kv, int64_t layer, const kf_step *step, const void *qkv_any,
                                 int64_t stride, const float *cos, const float *sin, int64_t table_rows,
                                 const void *q_norm, const void *k_norm, float eps, int64_t heads, void *q_any)
{
    const T *qkv = qkv_any;
    T *q = q_any;
    const int64_t hd = kv->head_dim, bs = kv->block_size, plane = kv->kv_heads * bs * hd;
    T key[KF_HEAD_DIM_MAX];
    for (int64_t t = 0; t < step->tokens; t++, qkv += stride) {
        const int64_t pos = step->positions[t], slot = step->slots[t];
        if (pos < 0 || pos >= table_rows)
            return KF_BAD_POSITION;
        if (slot < 0 || slot / bs >= kv->num_blocks)
            return KF_BAD_BLOCK;
        const float *c = cos + pos * (hd / 2), *s = sin + pos * (hd / 2);
        T *k = (T *)kv->base + ((slot / bs) * kv->layers + layer) * 2 * plane, *v = k + plane;
        const int64_t off = slot % bs;
        for (int64_t h = 0; h < heads; h++)
            FN(rope_head)(qkv + h * hd, q_norm, eps, c, s, hd, q + (t * heads + h) * hd);
        for (int64_t h = 0; h < kv->kv_heads; h++) {
            FN(rope_head)(qkv + (heads + h) * hd, k_norm, eps, c, s, hd, key);
            for (int64_t d = 0; d < hd; d++)
                k[(h * hd + d) * bs + off] = key[d];
            memcpy(v + (h * bs + off) * hd, qkv + (heads + kv->kv_heads + h) * hd, (size_t)hd * sizeof(T));
        }
    }
    return KF_OK;
}
