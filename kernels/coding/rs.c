/* XOR and Reed-Solomon: which shards are read and written in which pass. */
#include <stddef.h>

#include "coding.h"

/* Where the window that begins at `begin` ends: no data shard ends inside it, and the outputs of the next one are aligned. */
static int64_t window_end(const kf_shard *data, int n, const uint8_t *out, int64_t begin, int64_t end, int64_t window)
{
    if (end - begin > window) {
        end = begin + window;
        end -= (int64_t)((uintptr_t)(out + end) % 64);
    }
    for (int j = 0; j < n; j++)
        if (begin < data[j].size && data[j].size < end)
            end = data[j].size;
    return end;
}

static void addresses_at(const uint8_t **from, const kf_shard *shards, int n, int64_t at)
{
    for (int j = 0; j < n; j++)
        from[j] = shards[j].bytes != NULL && at < shards[j].size ? shards[j].bytes + at : NULL;
}

static void sum_of_rest(const kf_coding_ops *ops, uint8_t *out, const uint8_t *start, const uint8_t *const *from, int n,
                        int64_t size, int stream)
{
    static const uint8_t one = 1;
    const uint8_t *there[KF_DATA_MAX + 1];
    int count = 0;
    if (start != NULL)
        there[count++] = start;
    for (int j = 0; j < n; j++)
        if (from[j] != NULL)
            there[count++] = from[j];
    if (count)
        ops->sum(out, there, count, size, stream);
    else
        ops->dot(out, NULL, &one, NULL, 0, size, stream); /* zeros */
}

/* out[i] = start[i] + row i of the code times from; a row whose out is NULL is left out. */
/* Several outputs go past the cache one after the other, each a window long: line by line in turns they were ten times slower. */
static void rows_of(const kf_code *code, uint8_t *const *out, const uint8_t *const *start, const uint8_t *const *from,
                    int64_t size, int stream, const uint8_t *pair)
{
    const kf_coding_ops *ops = kf_coding_ops_in_use();
    int n = code->data;
    if (code->parity > 1 && out[1] != NULL)
        ops->powers(out[0], out[1], start[0], start[1], from, n, size, stream, pair);
    else if (out[0] != NULL)
        sum_of_rest(ops, out[0], start[0], from, n, size, stream);
    for (int i = 2; i < code->parity; i++)
        if (out[i] != NULL)
            ops->dot(out[i], start[i], code->rows[i], from, n, size, stream);
}

void kf_rs_encode(const kf_code *code, const kf_shard *data, const kf_shard *parity, int64_t begin, int64_t end)
{
    static const uint8_t *const nothing[KF_PARITY_MAX];
    const uint8_t *from[KF_DATA_MAX];
    uint8_t *out[KF_PARITY_MAX];
    const uint8_t *aligned = NULL;
    int64_t until;
    for (int i = 0; i < code->parity; i++)
        if (parity[i].bytes != NULL)
            aligned = parity[i].bytes;
    for (; begin < end; begin = until) {
        until = window_end(data, code->data, aligned, begin, end, code->parity == 1 ? KF_SINGLE : KF_WINDOW);
        addresses_at(from, data, code->data, begin);
        for (int i = 0; i < code->parity; i++)
            out[i] = parity[i].bytes != NULL ? parity[i].bytes + begin : NULL;
        rows_of(code, out, nothing, from, until - begin, parity[0].size >= KF_STREAM, NULL);
    }
    kf_coding_fence();
}

void kf_rs_update(const kf_code *code, int index, kf_shard shard, const kf_shard *parity, int64_t begin, int64_t end)
{
    const kf_coding_ops *ops = kf_coding_ops_in_use();
    int64_t until;
    if (end > shard.size)
        end = shard.size;
    for (; begin < end; begin = until) {
        until = end - begin > KF_WINDOW ? begin + KF_WINDOW : end;
        for (int i = 0; i < code->parity; i++) {
            uint8_t *out = parity[i].bytes + begin;
            const uint8_t *from[2] = {shard.bytes + begin, out};
            if (code->rows[i][index] == 1)
                ops->sum(out, from, 2, until - begin, 0);
            else
                ops->dot(out, out, &code->rows[i][index], from, 1, until - begin, 0);
        }
    }
}

/* The lost shards of one window from its syndromes. If the sum of all is among these, the last shard takes no factors. */
static void solve(const kf_repair *repair, uint8_t *const *out, uint8_t (*syndromes)[KF_WINDOW], int64_t size, int stream)
{
    const kf_coding_ops *ops = kf_coding_ops_in_use();
    _Alignas(64) uint8_t found[KF_PARITY_MAX][KF_WINDOW];
    const uint8_t *from[KF_PARITY_MAX], *terms[KF_PARITY_MAX];
    int last = repair->rows[0] == 0 ? repair->count - 1 : repair->count;
    terms[last] = syndromes[0];
    for (int i = 0; i < repair->count; i++)
        from[i] = syndromes[i];
    for (int i = 0; i < last; i++) {
        if (last == repair->count) {
            if (out[i] != NULL)
                ops->dot(out[i], NULL, repair->inverse[i], from, repair->count, size, stream);
            continue;
        }
        terms[i] = found[i];
        ops->dot(found[i], NULL, repair->inverse[i], from, repair->count, size, 0);
        if (out[i] != NULL)
            ops->sum(out[i], &terms[i], 1, size, stream);
    }
    if (last < repair->count && out[last] != NULL)
        ops->sum(out[last], terms, last + 1, size, stream);
}

void kf_rs_restore(const kf_code *code, const kf_repair *repair, const kf_shard *data, const kf_shard *parity, int64_t begin,
                   int64_t end)
{
    _Alignas(64) uint8_t syndromes[KF_PARITY_MAX][KF_WINDOW];
    const uint8_t *from[KF_DATA_MAX], *start[KF_PARITY_MAX] = {NULL};
    uint8_t *sums[KF_PARITY_MAX] = {NULL}, *out[KF_PARITY_MAX];
    int pair = repair->count == 2 && repair->rows[1] == 1;
    int direct = repair->count == 1 && repair->rows[0] == 0, stream = parity[repair->rows[0]].size >= KF_STREAM;
    int64_t until, longest = 0;
    for (int i = 0; i < repair->count; i++)
        if (data[repair->lost[i]].size > longest)
            longest = data[repair->lost[i]].size;
    if (end > longest)
        end = longest;
    for (; begin < end; begin = until) {
        until = window_end(data, code->data, data[repair->lost[0]].bytes, begin, end, direct ? KF_SINGLE : KF_WINDOW);
        addresses_at(from, data, code->data, begin);
        for (int i = 0; i < repair->count; i++) {
            int lost = repair->lost[i], row = repair->rows[i];
            from[lost] = NULL;
            out[i] = begin < data[lost].size ? data[lost].bytes + begin : NULL;
            start[row] = parity[row].bytes + begin;
            sums[row] = direct ? out[i] : syndromes[i];
        }
        /* Both unknowns are there and nothing else: they need not go through memory. */
        int in_place = pair && out[0] != NULL && out[1] != NULL;
        if (in_place) {
            sums[0] = out[0];
            sums[1] = out[1];
        }
        rows_of(code, sums, start, from, until - begin, (direct || in_place) && stream, in_place ? repair->inverse[0] : NULL);
        if (!direct && !in_place)
            solve(repair, out, syndromes, until - begin, stream);
    }
    kf_coding_fence();
}
