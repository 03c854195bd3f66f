/* The loops of kf_coding_ops over the vectors of one vec_*.h, which is included before; ends that instruction set. */
#define W ((int64_t)sizeof(V))
#define LOAD NAME(v_load)
#define ADD NAME(v_add)
#define OPERAND NAME(operand)
#define SUM_UNITS (W < 64 ? 8 : 4)
#define UNROLL _Pragma("GCC unroll 8")

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

/* `units` vectors, of which `n` bytes are there; `whole`: all. */
INL void NAME(get)(const int units, const int whole, V *a, const uint8_t *p, int64_t n)
{
    UNROLL for (int i = 0; i < units; i++)
        a[i] = whole ? LOAD(p + i * W) : NAME(load_n)(p, n);
}

INL void NAME(put)(const int units, const int whole, uint8_t *p, int64_t n, int stream, const V *a)
{
    UNROLL for (int i = 0; i < units; i++)
        if (!whole)
            NAME(store_n)(p, n, a[i]);
        else if (stream)
            NAME(v_stream)(p + i * W, a[i]);
        else
            NAME(v_store)(p + i * W, a[i]);
}

/* What comes from memory is fetched so many bytes ahead. */
INL void NAME(fetch)(const int units, int64_t ahead, const uint8_t *p)
{
    if (ahead)
        UNROLL for (int i = 0; i < units * W; i += 64)
            __builtin_prefetch(p + ahead + i);
}

INL void NAME(sum_of)(const int units, const int n, uint8_t *out, const uint8_t *const *from, int64_t size, int stream)
{
    const int ahead = stream;
    int64_t at = 0;
    stream = stream && (uintptr_t)out % W == 0;
    for (; at + units * W <= size; at += units * W) {
        V sum[8], a[8];
        NAME(get)(units, 1, sum, from[0] + at, 0);
        NAME(fetch)(units, ahead ? AHEAD_SUM : 0, from[0] + at);
        for (int j = 1; j < n; j++) {
            NAME(get)(units, 1, a, from[j] + at, 0);
            NAME(fetch)(units, ahead ? AHEAD_SUM : 0, from[j] + at);
            UNROLL for (int i = 0; i < units; i++)
                sum[i] = ADD(sum[i], a[i]);
        }
        NAME(put)(units, 1, out + at, 0, stream, sum);
    }
    for (; at < size; at += W) {
        V sum = NAME(v_zero)();
        for (int j = 0; j < n; j++)
            sum = ADD(sum, NAME(load_n)(from[j] + at, size - at));
        NAME(store_n)(out + at, size - at, sum);
    }
}

/* A loop of its own for each small n: a tenth faster. 256 bytes of a shard at a time: less is slower where they come from memory. */
TARGET static void NAME(sum)(uint8_t *out, const uint8_t *const *from, int n, int64_t size, int stream)
{
#ifdef STREAM_SUM
    if (stream) {
        STREAM_SUM(out, from, n, size, stream);
        return;
    }
#endif
    switch (n) {
    case 0: memset(out, 0, (size_t)size); break;
    case 1: NAME(sum_of)(SUM_UNITS, 1, out, from, size, stream); break;
    case 2: NAME(sum_of)(SUM_UNITS, 2, out, from, size, stream); break;
    case 3: NAME(sum_of)(SUM_UNITS, 3, out, from, size, stream); break;
    case 4: NAME(sum_of)(SUM_UNITS, 4, out, from, size, stream); break;
    case 5: NAME(sum_of)(SUM_UNITS, 5, out, from, size, stream); break;
    case 6: NAME(sum_of)(SUM_UNITS, 6, out, from, size, stream); break;
    case 7: NAME(sum_of)(SUM_UNITS, 7, out, from, size, stream); break;
    case 8: NAME(sum_of)(SUM_UNITS, 8, out, from, size, stream); break;
    default: NAME(sum_of)(SUM_UNITS, n, out, from, size, stream);
    }
}

/* What is written instead of k sums: inverse times them. If the first one is the sum of all unknowns (`sum`), the last unknown is what
 * it lacks then, and takes no factors. */
INL void NAME(solve_of)(const int units, const int k, const int sum, const uint8_t (*inverse)[KF_PARITY_MAX], V (*a)[4])
{
    UNROLL for (int i = 0; i < units; i++) {
        OPERAND known[KF_PARITY_MAX];
        V left = a[0][i];
        UNROLL for (int c = 0; c < k; c++)
            known[c] = NAME(v_operand)(a[c][i]);
        UNROLL for (int r = 0; r < k - sum; r++) {
            V found = NAME(v_zero)();
            UNROLL for (int c = 0; c < k; c++)
                found = NAME(v_mul_add)(found, NAME(v_factor)(inverse[r][c]), known[c]);
            left = ADD(left, found);
            a[r][i] = found;
        }
        if (sum)
            a[k - 1][i] = left;
    }
}

TARGET static __attribute__((noinline)) void NAME(solve_any)(int units, int k, int sum, const uint8_t (*inverse)[KF_PARITY_MAX],
                                                             V (*a)[4])
{
    NAME(solve_of)(units, k, sum, inverse, a);
}

/* In registers where there are few unknowns, else by way of memory. */
INL void NAME(solve)(const int units, const int k, const int sum, const uint8_t (*inverse)[KF_PARITY_MAX], V (*a)[4])
{
    V copy[KF_PARITY_MAX][4];
    if (__builtin_constant_p(k) && k <= 2) {
        NAME(solve_of)(units, k, sum, inverse, a);
        return;
    }
    UNROLL for (int c = 0; c < k; c++)
        UNROLL for (int i = 0; i < units; i++)
            copy[c][i] = a[c][i];
    NAME(solve_any)(units, k, sum, inverse, copy);
    UNROLL for (int c = 0; c < k; c++)
        UNROLL for (int i = 0; i < units; i++)
            a[c][i] = copy[c][i];
}

/* `units` vectors of all outputs at `at`. Powers by Horner's rule: the last shard first. `simple`: all shards and outputs are there, and
 * nothing else; a tenth faster. */
INL void NAME(block)(const int units, const int whole, const int simple, const int sum, const int powers, const int others,
                     const kf_pass *pass, int64_t at, int64_t n, int stream)
{
    const int k = sum + powers + others;
    V a[KF_PARITY_MAX][4];
    UNROLL for (int c = 0; c < k; c++)
        UNROLL for (int i = 0; i < units; i++)
            a[c][i] = NAME(v_zero)();
    for (int j = pass->n - 1; j >= 0; j--) {
        V d[4];
        NAME(get)(units, whole, d, pass->from[j] + (simple ? at : at & pass->there[j]), n);
        UNROLL for (int i = 0; i < units; i++) {
            if (sum)
                a[0][i] = ADD(a[0][i], d[i]);
            if (powers)
                a[sum][i] = NAME(v_horner)(a[sum][i], d[i]);
        }
        if (others)
            UNROLL for (int i = 0; i < units; i++) {
                OPERAND operand = NAME(v_operand)(d[i]);
                UNROLL for (int c = sum + powers; c < k; c++)
                    a[c][i] = NAME(v_mul_add)(a[c][i], NAME(v_factor)(pass->factors[c][j]), operand);
            }
    }
    UNROLL for (int c = 0; c < k; c++)
        if (!simple && pass->start[c] != NULL) {
            V d[4];
            NAME(get)(units, whole, d, pass->start[c] + at, n);
            UNROLL for (int i = 0; i < units; i++)
                a[c][i] = ADD(a[c][i], d[i]);
        }
    if (!simple && pass->inverse != NULL)
        NAME(solve)(units, k, sum, pass->inverse, a);
    UNROLL for (int c = 0; c < k; c++)
        if (simple || pass->out[c] != NULL)
            NAME(put)(units, whole, pass->out[c] + at, n, stream, a[c]);
}

/* As many vectors at a time as the registers hold: sums, what is added, and factors. */
#define UNITS(k) ((k) <= REGISTERS / 8 + 1 && REGISTERS == 32 ? 4 : (k) <= 2 ? 4 : (k) <= REGISTERS / 4 ? 2 : 1)

INL void NAME(fetch_all)(const int units, const int k, const kf_pass *pass, int64_t at)
{
    for (int j = 0; j < pass->n; j++)
        NAME(fetch)(units, AHEAD, pass->from[j] + (at & pass->there[j]));
    for (int c = 0; c < k; c++)
        if (pass->start[c] != NULL)
            NAME(fetch)(units, AHEAD, pass->start[c] + at);
}

INL int64_t NAME(blocks)(const int units, const int simple, const int sum, const int powers, const int others, const kf_pass *pass)
{
    int64_t at = 0;
    int stream = pass->stream;
    for (int c = 0; c < sum + powers + others; c++)
        stream = stream && (uintptr_t)pass->out[c] % W == 0;
    for (; at + units * W <= pass->size; at += units * W) {
        if (pass->stream)
            NAME(fetch_all)(units, sum + powers + others, pass, at);
        NAME(block)(units, 1, simple, sum, powers, others, pass, at, units * W, stream);
    }
    return at;
}

#define PASS(sum, powers, others) \
    case 100 * sum + 10 * powers + others: at = NAME(blocks)(UNITS(sum + powers + others), 0, sum, powers, others, pass); break

static int NAME(is_simple)(const kf_pass *pass)
{
    int simple = pass->inverse == NULL;
    for (int c = 0; c < pass->sum + pass->powers + pass->others; c++)
        simple = simple && pass->start[c] == NULL && pass->out[c] != NULL;
    for (int j = 0; j < pass->n; j++)
        simple = simple && pass->there[j];
    return simple;
}

/* What is common has a loop of its own, whose sums stay in registers; an encoding with two parities two of them. */
TARGET static void NAME(pass)(const kf_pass *pass)
{
    int64_t at;
    int which = 100 * pass->sum + 10 * pass->powers + pass->others;
    switch (which == 110 && NAME(is_simple)(pass) ? 0 : which) {
    case 0: at = NAME(blocks)(UNITS(2), 1, 1, 1, 0, pass); break;
        PASS(1, 1, 0);
#if !FEW_LOOPS
        PASS(1, 0, 0);
        PASS(0, 1, 0);
        PASS(1, 0, 1);
        PASS(0, 1, 1);
        PASS(0, 0, 1);
        PASS(0, 0, 2);
        PASS(0, 0, 3);
        PASS(1, 1, 1);
        PASS(1, 1, 2);
#endif
    default: at = NAME(blocks)(4, 0, pass->sum, pass->powers, pass->others, pass);
    }
    for (; at < pass->size; at += W)
        NAME(block)(1, 0, 0, pass->sum, pass->powers, pass->others, pass, at, pass->size - at, 0);
}

/* Factors stay in registers: there is one for each output. `ones`: the first of them is 1. */
INL void NAME(update_of)(const int k, const int ones, uint8_t *const *out, const uint8_t *factors, const uint8_t *from, int64_t size)
{
    const int units = 2;
    NAME(factor) f[4];
    int64_t at = 0;
    UNROLL for (int c = ones; c < k; c++)
        f[c] = NAME(v_factor)(factors[c]);
    for (; at + units * W <= size; at += units * W) {
        V d[2], a[2];
        OPERAND operand[2];
        NAME(get)(units, 1, d, from + at, 0);
        NAME(fetch)(units, AHEAD, from + at);
        UNROLL for (int i = 0; i < units; i++)
            operand[i] = NAME(v_operand)(d[i]);
        UNROLL for (int c = 0; c < k; c++) {
            NAME(get)(units, 1, a, out[c] + at, 0);
            NAME(fetch)(units, AHEAD, out[c] + at);
            UNROLL for (int i = 0; i < units; i++)
                a[i] = c < ones ? ADD(a[i], d[i]) : NAME(v_mul_add)(a[i], f[c], operand[i]);
            NAME(put)(units, 1, out[c] + at, 0, 0, a);
        }
    }
    for (; at < size; at += W)
        for (int c = 0; c < k; c++) {
            V d = NAME(load_n)(from + at, size - at), a = NAME(load_n)(out[c] + at, size - at);
            NAME(store_n)(out[c] + at, size - at, NAME(v_mul_add)(a, NAME(v_factor)(factors[c]), NAME(v_operand)(d)));
        }
}

TARGET static void NAME(update)(uint8_t *const *out, const uint8_t *factors, int k, const uint8_t *from, int64_t size)
{
    for (; k > 4; k -= 4) {
        NAME(update_of)(4, 0, out, factors, from, size);
        out += 4;
        factors += 4;
    }
    switch (10 * k + (factors[0] == 1)) {
    case 11: NAME(update_of)(1, 1, out, factors, from, size); break;
    case 21: NAME(update_of)(2, 1, out, factors, from, size); break;
    case 31: NAME(update_of)(3, 1, out, factors, from, size); break;
    case 41: NAME(update_of)(4, 1, out, factors, from, size); break;
    case 10: NAME(update_of)(1, 0, out, factors, from, size); break;
    case 20: NAME(update_of)(2, 0, out, factors, from, size); break;
    case 30: NAME(update_of)(3, 0, out, factors, from, size); break;
    case 40: NAME(update_of)(4, 0, out, factors, from, size); break;
    }
}

static const kf_coding_ops NAME(ops) = {CHEAP_PRODUCTS, NAME(pass), NAME(sum), NAME(update)};

#undef NAME
#undef TARGET
#undef INL
#undef V
#undef W
#undef LOAD
#undef ADD
#undef UNROLL
#undef SUM_UNITS
#undef AHEAD
#undef FEW_LOOPS
#undef CHEAP_PRODUCTS
#undef AHEAD_SUM
#undef OPERAND
#undef UNITS
#undef PASS
#undef REGISTERS
