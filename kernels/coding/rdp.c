/* Row-diagonal parity (P. Corbett et al., "Row-Diagonal Parity for Double Disk Failure Correction", FAST 2004), for p = 17.
 *
 * A shard is p - 1 rows of `width` bytes. Columns 0 .. n - 1 are data, column p - 1 is the row parity; columns between are zeros. Row
 * r of column c is on diagonal (r + c) mod p. The second parity has the sums of diagonals 0 .. p - 2. */
#include <stddef.h>

#include "coding.h"

#define P KF_RDP_PRIME
#define ROWS KF_RDP_ROWS
#define KF_RDP_WINDOW 2048

static uint8_t *cell(kf_shard shard, int64_t width, int row, int64_t at)
{
    int64_t begin = row * width + at;
    return shard.bytes != NULL && begin < shard.size ? shard.bytes + begin : NULL;
}

/* Where the window that begins at position `begin` of all rows ends: no shard ends inside it. */
static int64_t window_end(const kf_shard *data, int n, int64_t width, int64_t begin, int64_t end)
{
    if (end - begin > KF_RDP_WINDOW)
        end = begin + KF_RDP_WINDOW;
    for (int j = 0; j < n; j++)
        if (begin < data[j].size % width && data[j].size % width < end)
            end = data[j].size % width;
    return end;
}

static void sum_into(uint8_t *out, const uint8_t *const *terms, int count, int64_t size, int stream)
{
    kf_coding_ops_in_use()->sum(out, terms, count, size, stream);
}

/* The data cells of a row, or of a diagonal. Columns x and y are left out. */
static int line_of(const uint8_t **terms, const kf_shard *data, int n, int64_t width, int line, int diagonal, int x, int y, int64_t at)
{
    int count = 0;
    for (int column = 0; column < n; column++) {
        int row = diagonal ? (line - column + P) % P : line;
        const uint8_t *bytes = column == x || column == y || row == ROWS ? NULL : cell(data[column], width, row, at);
        if (bytes != NULL)
            terms[count++] = bytes;
    }
    return count;
}

void kf_rdp_encode(int n, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end, int stream)
{
    _Alignas(64) uint8_t scratch[ROWS][KF_RDP_WINDOW];
    const uint8_t *terms[P];
    int64_t until;
    for (; begin < end; begin = until) {
        uint8_t *rows[P] = {NULL};
        int64_t size = (until = window_end(data, n, width, begin, end)) - begin;
        for (int row = 0; row < ROWS; row++) {
            uint8_t *wanted = cell(parity[0], width, row, begin);
            rows[row] = wanted != NULL ? wanted : scratch[row];
            sum_into(rows[row], terms, line_of(terms, data, n, width, row, 0, -1, -1, begin), size, 0);
        }
        for (int line = 0; line < ROWS && parity[1].bytes != NULL; line++) {
            int count = line_of(terms, data, n, width, line, 1, -1, -1, begin);
            if (line + 1 < ROWS)
                terms[count++] = rows[line + 1]; /* of the row parity */
            sum_into(cell(parity[1], width, line, begin), terms, count, size, stream < 0 ? parity[1].size >= KF_STREAM : stream);
        }
    }
    kf_coding_fence();
}

void kf_rdp_update(int index, kf_shard shard, const kf_shard *parity, int64_t width, int64_t begin, int64_t end)
{
    int64_t until;
    for (; begin < end; begin = until) {
        int64_t size = (until = window_end(&shard, 1, width, begin, end)) - begin;
        for (int line = 0; line < ROWS; line++) {
            int row = (line - index + P) % P;
            const uint8_t *own = cell(shard, width, line, begin);
            const uint8_t *on_diagonal = row < ROWS ? cell(shard, width, row, begin) : NULL;
            const uint8_t *in_parity = line + 1 < ROWS ? cell(shard, width, line + 1, begin) : NULL;
            const uint8_t *terms[3] = {cell(parity[0], width, line, begin), own};
            if (own != NULL)
                sum_into(cell(parity[0], width, line, begin), terms, 2, size, 0);
            int count = 1;
            terms[0] = cell(parity[1], width, line, begin);
            if (on_diagonal != NULL)
                terms[count++] = on_diagonal;
            if (in_parity != NULL)
                terms[count++] = in_parity;
            if (count > 1)
                sum_into(cell(parity[1], width, line, begin), terms, count, size, 0);
        }
    }
}

/* What the rows and the diagonals of a window lack: the sums of what is left of them. */
static void syndromes(int n, int x, int y, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t at, int64_t size,
                      uint8_t (*across)[KF_RDP_WINDOW], uint8_t (*along)[KF_RDP_WINDOW])
{
    const uint8_t *terms[P + 2];
    for (int line = 0; line < ROWS; line++) {
        int count = line_of(terms, data, n, width, line, 0, x, y, at);
        if (y != ROWS)
            terms[count++] = cell(parity[0], width, line, at);
        sum_into(across[line], terms, count, size, 0);
        count = line_of(terms, data, n, width, line, 1, x, y, at);
        if (y != ROWS && line + 1 < ROWS)
            terms[count++] = cell(parity[0], width, line + 1, at);
        terms[count++] = cell(parity[1], width, line, at);
        sum_into(along[line], terms, count, size, 0);
    }
}

/* Begins at the diagonal that has nothing of column `second`: what it lacks is a cell of `first`, by which the row gives one of
 * `second`, and that what the next diagonal lacks. */
static void walk(int first, int second, kf_shard first_shard, kf_shard second_shard, int64_t width, int64_t at, int64_t size,
                 uint8_t (*across)[KF_RDP_WINDOW], uint8_t (*along)[KF_RDP_WINDOW], int stream)
{
    int diagonal = (second + P - 1) % P;
    while (diagonal != ROWS) {
        int row = (diagonal - first + P) % P;
        uint8_t *out = cell(first_shard, width, row, at);
        const uint8_t *terms[2] = {along[diagonal], across[row]};
        if (out != NULL)
            sum_into(out, terms, 1, size, stream < 0 ? first_shard.size >= KF_STREAM : stream);
        sum_into(across[row], terms, 2, size, 0);
        terms[0] = across[row];
        out = cell(second_shard, width, row, at);
        if (out != NULL)
            sum_into(out, terms, 1, size, stream < 0 ? second_shard.size >= KF_STREAM : stream);
        diagonal = (row + second) % P;
        if (diagonal != ROWS) {
            terms[1] = along[diagonal];
            sum_into(along[diagonal], terms, 2, size, 0);
        }
    }
}

void kf_rdp_restore(int n, int x, int y, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end,
                     int stream)
{
    _Alignas(64) uint8_t across[ROWS][KF_RDP_WINDOW], along[ROWS][KF_RDP_WINDOW];
    kf_shard second = y == ROWS ? parity[0] : data[y];
    int64_t until;
    for (; begin < end; begin = until) {
        until = window_end(data, n, width, begin, end);
        syndromes(n, x, y, data, parity, width, begin, until - begin, across, along);
        walk(x, y, data[x], second, width, begin, until - begin, across, along, stream);
        walk(y, x, second, data[x], width, begin, until - begin, across, along, stream);
    }
    kf_coding_fence();
}
