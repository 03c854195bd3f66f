/* The loops of kf_coding_ops over the vectors of one vec_*.h, which is included before; ends that instruction set. */
#define W ((int64_t)sizeof(V))
#define LOAD NAME(v_load)
#define ADD NAME(v_add)

INL V NAME(load_n)(const uint8_t *p, int64_t n)
{
    uint8_t whole[sizeof(V)] = {0};
    if (n >= W)
        return LOAD(p);
    memcpy(whole, p, (size_t)n);
    return LOAD(whole);
}

INL void NAME(store_n)(uint8_t *p, int64_t n, V a)
{
    uint8_t whole[sizeof(V)];
    if (n >= W) {
        NAME(v_store)(p, a);
        return;
    }
    NAME(v_store)(whole, a);
    memcpy(p, whole, (size_t)n);
}

INL void NAME(put4)(uint8_t *p, int stream, const V a[4])
{
    for (int i = 0; i < 4; i++)
        if (stream)
            NAME(v_stream)(p + i * W, a[i]);
        else
            NAME(v_store)(p + i * W, a[i]);
}

INL void NAME(sum_of)(const int n, uint8_t *out, const uint8_t *const *from, int64_t size, int stream)
{
    int64_t at = 0;
    stream = stream && (uintptr_t)out % W == 0;
    for (; at + 4 * W <= size; at += 4 * W) {
        V sum[4];
        for (int i = 0; i < 4; i++)
            sum[i] = LOAD(from[0] + at + i * W);
        for (int j = 1; j < n; j++)
            for (int i = 0; i < 4; i++)
                sum[i] = ADD(sum[i], LOAD(from[j] + at + i * W));
        NAME(put4)(out + at, stream, sum);
    }
    for (; at < size; at += W) {
        V sum = NAME(v_zero)();
        for (int j = 0; j < n; j++)
            sum = ADD(sum, NAME(load_n)(from[j] + at, size - at));
        NAME(store_n)(out + at, size - at, sum);
    }
}

/* A loop of its own for each small n: a tenth faster. */
TARGET static void NAME(sum)(uint8_t *out, const uint8_t *const *from, int n, int64_t size, int stream)
{
    switch (n) {
    case 1: NAME(sum_of)(1, out, from, size, stream); break;
    case 2: NAME(sum_of)(2, out, from, size, stream); break;
    case 3: NAME(sum_of)(3, out, from, size, stream); break;
    case 4: NAME(sum_of)(4, out, from, size, stream); break;
    case 5: NAME(sum_of)(5, out, from, size, stream); break;
    case 6: NAME(sum_of)(6, out, from, size, stream); break;
    case 7: NAME(sum_of)(7, out, from, size, stream); break;
    case 8: NAME(sum_of)(8, out, from, size, stream); break;
    default: NAME(sum_of)(n, out, from, size, stream);
    }
}

INL V NAME(start_n)(const uint8_t *start, int64_t at, int64_t n)
{
    return start == NULL ? NAME(v_zero)() : NAME(load_n)(start + at, n);
}

/* The two unknowns from the sums of both parities: pair[0] p + pair[1] q, and what p lacks then. */
INL void NAME(solve)(const uint8_t *pair, V *p, V *q)
{
    V first = NAME(v_mul_add)(NAME(v_mul_add)(NAME(v_zero)(), NAME(v_factor)(pair[0]), *p), NAME(v_factor)(pair[1]), *q);
    *q = ADD(*p, first);
    *p = first;
}

/* q by Horner's rule: the last shard first. */
INL void NAME(powers_of)(const int with_p, uint8_t *p, uint8_t *q, const uint8_t *start_p, const uint8_t *start_q,
                         const uint8_t *const *from, int n, int64_t size, int stream, const uint8_t *pair)
{
    int64_t at = 0;
    int direct = stream && (uintptr_t)q % W == 0 && (uintptr_t)p % W == 0;
    for (; at + 4 * W <= size; at += 4 * W) {
        V sum[4], horner[4];
        for (int i = 0; i < 4; i++) {
            sum[i] = with_p ? NAME(start_n)(start_p, at + i * W, W) : NAME(v_zero)();
            horner[i] = NAME(v_zero)();
        }
        for (int j = n - 1; j >= 0; j--) {
            const uint8_t *shard = from[j];
            for (int i = 0; i < 4; i++) {
                V d = shard == NULL ? NAME(v_zero)() : LOAD(shard + at + i * W);
                horner[i] = NAME(v_horner)(horner[i], d);
                if (with_p)
                    sum[i] = ADD(sum[i], d);
            }
        }
        for (int i = 0; i < 4; i++)
            horner[i] = ADD(horner[i], NAME(start_n)(start_q, at + i * W, W));
        if (with_p && pair != NULL)
            for (int i = 0; i < 4; i++)
                NAME(solve)(pair, &sum[i], &horner[i]);
        if (with_p)
            NAME(put4)(p + at, direct, sum);
        NAME(put4)(q + at, direct, horner);
    }
    for (; at < size; at += W) {
        V sum = NAME(start_n)(start_p, at, size - at), horner = NAME(v_zero)();
        for (int j = n - 1; j >= 0; j--) {
            V d = NAME(start_n)(from[j], at, size - at);
            horner = NAME(v_horner)(horner, d);
            sum = ADD(sum, d);
        }
        horner = ADD(horner, NAME(start_n)(start_q, at, size - at));
        if (with_p && pair != NULL)
            NAME(solve)(pair, &sum, &horner);
        if (with_p)
            NAME(store_n)(p + at, size - at, sum);
        NAME(store_n)(q + at, size - at, horner);
    }
}

TARGET static void NAME(powers)(uint8_t *p, uint8_t *q, const uint8_t *start_p, const uint8_t *start_q,
                                const uint8_t *const *from, int n, int64_t size, int stream, const uint8_t *pair)
{
    if (p != NULL)
        NAME(powers_of)(1, p, q, start_p, start_q, from, n, size, stream, pair);
    else
        NAME(powers_of)(0, NULL, q, NULL, start_q, from, n, size, stream, NULL);
}

TARGET static void NAME(dot)(uint8_t *out, const uint8_t *start, const uint8_t *c, const uint8_t *const *from, int n, int64_t size,
                             int stream)
{
    int64_t at = 0;
    int direct = stream && (uintptr_t)out % W == 0;
    for (; at + 4 * W <= size; at += 4 * W) {
        V sum[4];
        for (int i = 0; i < 4; i++)
            sum[i] = NAME(start_n)(start, at + i * W, W);
        for (int j = 0; j < n; j++) {
            if (from[j] == NULL)
                continue;
            const NAME(factor) factor = NAME(v_factor)(c[j]);
            for (int i = 0; i < 4; i++)
                sum[i] = NAME(v_mul_add)(sum[i], factor, LOAD(from[j] + at + i * W));
        }
        NAME(put4)(out + at, direct, sum);
    }
    for (; at < size; at += W) {
        V sum = NAME(start_n)(start, at, size - at);
        for (int j = 0; j < n; j++)
            if (from[j] != NULL)
                sum = NAME(v_mul_add)(sum, NAME(v_factor)(c[j]), NAME(load_n)(from[j] + at, size - at));
        NAME(store_n)(out + at, size - at, sum);
    }
}

static const kf_coding_ops NAME(ops) = {NAME(sum), NAME(powers), NAME(dot)};

#undef NAME
#undef TARGET
#undef INL
#undef V
#undef W
#undef LOAD
#undef ADD
