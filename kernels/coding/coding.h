/* Erasure codes over shards of bytes: C interface. docs/decisions/erasure-codes.md has the algebra.
 *
 * N data shards have K parity shards; a data shard may be shorter than the parity, as if zeros followed. Every call works on the
 * positions [begin, end) only, keeps nothing, and allocates nothing: parts of one call may run in several threads. Outputs must not
 * overlap what the call reads, except where it says so. */
#ifndef KF_CODING_H
#define KF_CODING_H
#include <stdint.h>

#define KF_DATA_MAX 256
#define KF_PARITY_MAX 8
#define KF_STREAM (1 << 20) /* outputs of so many bytes go past the cache, unless the caller knows better */

/* One factor of GF(2^8) over x^8 + x^4 + x^3 + x^2 + 1, in the two forms that processors multiply bytes with. */
typedef struct {
    uint8_t low[16], high[16]; /* its products with 0 .. 15, and with 0, 16 .. 240 */
    uint64_t affine;           /* as a matrix of bits: see GF2P8AFFINEQB */
} kf_product;

typedef struct {
    uint8_t *bytes; /* NULL: not there, not wanted */
    int64_t size;
} kf_shard;

/* Parity i is the sum of rows[i][j] data[j]. Row 0 must be ones and row 1 powers of two, which cost no table. */
typedef struct {
    int data, parity;
    uint8_t rows[KF_PARITY_MAX][KF_DATA_MAX];
} kf_code;

/* lost[i] is the sum of inverse[i][j] syndrome[j], where syndrome[j] is what parity rows[j] and the data that are left add up to. */
typedef struct {
    int count;
    int lost[KF_PARITY_MAX], rows[KF_PARITY_MAX];
    uint8_t inverse[KF_PARITY_MAX][KF_PARITY_MAX];
} kf_repair;

/* One pass over `n` shards that makes several outputs at once, each start + a row of factors times the shards: first, if `sum`, the
 * sum; then, if `powers`, d0 + 2 d1 + 4 d2 ..; then `others` with factors[other]. With `inverse`, what is written is not these sums a
 * but inverse times a. NULL in start is zeros; what is NULL in out is not written. An output may be its own start. */
typedef struct {
    int n, sum, powers, others;
    const uint8_t *from[KF_DATA_MAX]; /* of a shard that is not there: kf_zeros */
    int64_t there[KF_DATA_MAX];       /* -1, or 0 for kf_zeros, which begins again and again */
    const uint8_t *start[KF_PARITY_MAX];
    uint8_t *out[KF_PARITY_MAX];
    const uint8_t *factors[KF_PARITY_MAX]; /* of each output; n of them */
    const uint8_t (*inverse)[KF_PARITY_MAX];
    int64_t size; /* bytes of each */
    int stream;   /* outputs go past the cache, where their addresses allow */
} kf_pass;

/* The loops that depend on the instruction set. */
typedef struct {
    int cheap_products; /* a product takes no longer than reading a shard */
    void (*pass)(const kf_pass *pass);
    /* out = from[0] + .. + from[n - 1]; out may be one of them */
    void (*sum)(uint8_t *out, const uint8_t *const *from, int n, int64_t size, int stream);
    /* out[i] += factors[i] from, for k > 0 outputs */
    void (*update)(uint8_t *const *out, const uint8_t *factors, int k, const uint8_t *from, int64_t size);
} kf_coding_ops;

extern kf_product kf_products[256];
extern const uint8_t kf_zeros[256]; /* as much as a loop takes at a time */

void kf_coding_init(void); /* once, before anything else here */
int kf_coding_set_level(int level); /* 0 C, 1 AVX2, 2 AVX-512, 3 with GFNI, -1 the best. Returns what is in use. */
const kf_coding_ops *kf_coding_ops_in_use(void);
void kf_coding_fence(void); /* what went past the cache is seen before what is written next */

/* XOR (K = 1) and Reed-Solomon. A parity of NULL is not computed. `stream`: outputs go past the cache; -1: if they are long. */
void kf_rs_encode(const kf_code *code, const kf_shard *data, const kf_shard *parity, int64_t begin, int64_t end, int stream);
/* Adds data shard `index` to parities that did not have it. */
void kf_rs_update(const kf_code *code, int index, kf_shard shard, const kf_shard *parity, int64_t begin, int64_t end);
void kf_rs_restore(const kf_code *code, const kf_repair *repair, const kf_shard *data, const kf_shard *parity, int64_t begin,
                   int64_t end, int stream);

/* Row-diagonal parity: a parity is KF_RDP_ROWS rows of `width` bytes; [begin, end) are positions in a row. */
#define KF_RDP_PRIME 17
#define KF_RDP_ROWS (KF_RDP_PRIME - 1)
void kf_rdp_encode(int n, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end, int stream);
void kf_rdp_update(int index, kf_shard shard, const kf_shard *parity, int64_t width, int64_t begin, int64_t end);
/* Two lost columns x < y, of which y may be KF_RDP_ROWS: the row parity. */
void kf_rdp_restore(int n, int x, int y, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end,
                    int stream);
#endif
