/* XOR and Reed-Solomon: which shards are read and written in which pass. */
#include <stddef.h>

#include "coding.h"

/* Where the piece that begins at `begin` ends: no data shard ends inside it, and the outputs of the next one are aligned. */
static int64_t piece_end(const kf_shard *data, int n, const uint8_t *out, int64_t begin, int64_t end)
{
    int64_t aligned = begin + (int64_t)(-(uintptr_t)(out + begin) % 64);
    if (begin < aligned && aligned < end)
        end = aligned;
    for (int j = 0; j < n; j++)
        if (begin < data[j].size && data[j].size < end)
            end = data[j].size;
    return end;
}

static void run(kf_pass *pass)
{
    const kf_coding_ops *ops = kf_coding_ops_in_use();
    if (pass->sum + pass->powers + pass->others == 0)
        return;
    if (pass->sum + pass->powers + pass->others > 1 || !pass->sum || pass->inverse != NULL || pass->out[0] == NULL) {
        ops->pass(pass);
        return;
    }
    const uint8_t *there[KF_DATA_MAX + 1];
    int count = 0;
    if (pass->start[0] != NULL)
        there[count++] = pass->start[0];
    for (int j = 0; j < pass->n; j++)
        if (pass->there[j])
            there[count++] = pass->from[j];
    ops->sum(pass->out[0], there, count, pass->size, pass->stream);
}

/* Output `count` of a pass is row `row` of the code. Rows come in their order. */
static void add_row(kf_pass *pass, int count, const kf_code *code, int row, const uint8_t *start, uint8_t *out)
{
    pass->start[count] = start;
    pass->out[count] = out;
    pass->factors[count] = code->rows[row];
    pass->sum += row == 0;
    pass->powers += row == 1;
    pass->others += row > 1;
}

static void shards_at(kf_pass *pass, const kf_shard *data, int n, int64_t at)
{
    pass->n = n;
    for (int j = 0; j < n; j++) {
        int there = data[j].bytes != NULL && at < data[j].size;
        pass->from[j] = there ? data[j].bytes + at : kf_zeros;
        pass->there[j] = -there;
    }
}

void kf_rs_encode(const kf_code *code, const kf_shard *data, const kf_shard *parity, int64_t begin, int64_t end, int stream)
{
    const uint8_t *aligned = NULL;
    int64_t until;
    for (int i = 0; i < code->parity; i++)
        if (parity[i].bytes != NULL)
            aligned = parity[i].bytes;
    for (; begin < end; begin = until) {
        kf_pass pass = {.stream = stream < 0 ? parity[0].size >= KF_STREAM : stream};
        int count = 0;
        until = piece_end(data, code->data, aligned, begin, end);
        pass.size = until - begin;
        shards_at(&pass, data, code->data, begin);
        for (int i = 0; i < code->parity; i++)
            if (parity[i].bytes != NULL)
                add_row(&pass, count++, code, i, NULL, parity[i].bytes + begin);
        run(&pass);
    }
    kf_coding_fence();
}

void kf_rs_update(const kf_code *code, int index, kf_shard shard, const kf_shard *parity, int64_t begin, int64_t end)
{
    uint8_t *out[KF_PARITY_MAX], factors[KF_PARITY_MAX];
    if (end > shard.size)
        end = shard.size;
    for (int i = 0; i < code->parity; i++) {
        out[i] = parity[i].bytes + begin;
        factors[i] = code->rows[i][index];
    }
    if (begin < end)
        kf_coding_ops_in_use()->update(out, factors, code->parity, shard.bytes + begin, end - begin);
}

static uint8_t product(uint8_t a, uint8_t b) { return kf_products[a].low[b & 15] ^ kf_products[a].high[b >> 4]; }

/* What the data that is left, and the parities in the places of what is lost, are multiplied with to give what is lost. */
static void restoring_rows(const kf_code *code, const kf_repair *repair, uint8_t (*rows)[KF_DATA_MAX])
{
    for (int i = 0; i < repair->count; i++) {
        for (int j = 0; j < code->data; j++) {
            rows[i][j] = 0;
            for (int r = 0; r < repair->count; r++)
                rows[i][j] ^= product(repair->inverse[i][r], code->rows[repair->rows[r]][j]);
        }
        for (int r = 0; r < repair->count; r++)
            rows[i][repair->lost[r]] = repair->inverse[i][r];
    }
}

void kf_rs_restore(const kf_code *code, const kf_repair *repair, const kf_shard *data, const kf_shard *parity, int64_t begin,
                   int64_t end, int stream)
{
    uint8_t rows[KF_PARITY_MAX][KF_DATA_MAX];
    int single = repair->count == 1 && repair->rows[0] == 0;
    /* Syndromes need few products; where these are cheap, it is better to read everything in one way. */
    int direct = !single && kf_coding_ops_in_use()->cheap_products;
    int64_t until, longest = 0;
    if (direct)
        restoring_rows(code, repair, rows);
    for (int i = 0; i < repair->count; i++)
        if (data[repair->lost[i]].size > longest)
            longest = data[repair->lost[i]].size;
    if (end > longest)
        end = longest;
    for (; begin < end; begin = until) {
        kf_pass pass = {.stream = stream < 0 ? longest >= KF_STREAM : stream};
        until = piece_end(data, code->data, data[repair->lost[0]].bytes, begin, end);
        pass.size = until - begin;
        shards_at(&pass, data, code->data, begin);
        for (int i = 0; i < repair->count; i++) {
            int lost = repair->lost[i];
            const uint8_t *check = parity[repair->rows[i]].bytes + begin;
            uint8_t *out = begin < data[lost].size ? data[lost].bytes + begin : NULL;
            pass.from[lost] = direct ? check : kf_zeros;
            pass.there[lost] = -direct;
            if (direct) {
                pass.out[i] = out;
                pass.factors[i] = rows[i];
                pass.others++;
            } else
                add_row(&pass, i, code, repair->rows[i], check, out);
        }
        if (!single && !direct)
            pass.inverse = repair->inverse;
        run(&pass);
    }
    kf_coding_fence();
}
