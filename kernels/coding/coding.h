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
#define KF_WINDOW 4096       /* bytes of each shard that several passes go over while they are in the cache */
#define KF_SINGLE (1 << 16)  /* of each shard, where one pass does */
#define KF_STREAM (1 << 20)  /* an output of so many bytes goes past the cache */

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

/* The loops that depend on the instruction set. `from` is read and `out` written at [0, size); `stream`: past the cache, where
 * addresses allow. An output may be one of the inputs. */
typedef struct {
    /* out = from[0] + .. + from[n - 1]; n > 0 */
    void (*sum)(uint8_t *out, const uint8_t *const *from, int n, int64_t size, int stream);
    /* p = start_p + from[0] + .. ; q = start_q + from[0] + 2 from[1] + 4 from[2] ..; NULL in from and start counts as zeros, p may
     * be NULL. With a pair, what is written is instead a = pair[0] p + pair[1] q, and p - a: two lost shards. */
    void (*powers)(uint8_t *p, uint8_t *q, const uint8_t *start_p, const uint8_t *start_q, const uint8_t *const *from, int n,
                   int64_t size, int stream, const uint8_t *pair);
    /* out = start + c[0] from[0] + ..; start NULL, and NULL in from, count as zeros */
    void (*dot)(uint8_t *out, const uint8_t *start, const uint8_t *c, const uint8_t *const *from, int n, int64_t size, int stream);
} kf_coding_ops;

extern kf_product kf_products[256];

void kf_coding_init(void); /* once, before anything else here */
int kf_coding_set_level(int level); /* 0 C, 1 AVX2, 2 AVX-512, 3 with GFNI, -1 the best. Returns what is in use. */
const kf_coding_ops *kf_coding_ops_in_use(void);
void kf_coding_fence(void); /* what went past the cache is seen before what is written next */

/* XOR (K = 1) and Reed-Solomon. A parity of NULL is not computed. */
void kf_rs_encode(const kf_code *code, const kf_shard *data, const kf_shard *parity, int64_t begin, int64_t end);
/* Adds data shard `index` to parities that did not have it. */
void kf_rs_update(const kf_code *code, int index, kf_shard shard, const kf_shard *parity, int64_t begin, int64_t end);
void kf_rs_restore(const kf_code *code, const kf_repair *repair, const kf_shard *data, const kf_shard *parity, int64_t begin,
                   int64_t end);

/* Row-diagonal parity: a parity is KF_RDP_ROWS rows of `width` bytes; [begin, end) are positions in a row. */
#define KF_RDP_PRIME 17
#define KF_RDP_ROWS (KF_RDP_PRIME - 1)
void kf_rdp_encode(int n, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end);
void kf_rdp_update(int index, kf_shard shard, const kf_shard *parity, int64_t width, int64_t begin, int64_t end);
/* Two lost columns x < y, of which y may be KF_RDP_ROWS: the row parity. */
void kf_rdp_restore(int n, int x, int y, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end);
#endif
