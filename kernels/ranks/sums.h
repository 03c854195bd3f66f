/* A sum over shards that has the same bits in any order and grouping: of integers.
 *
 * A shard's partial sum, a float32, counts as rint(x * 2^32) in 64 bits. Whole numbers are added without rounding, so it
 * does not matter who adds what first. Back: to float64, rounded to nearest, and to float32, rounded to nearest. */
#ifndef KF_SUMS_H
#define KF_SUMS_H
#include <stdint.h>

/* Limits the instruction set: 0 C, 1 AVX2, -1 the best. All give the same bits. Returns what is in use. */
int kf_sums_set_level(int level);

/* sums[i] += rint(x[i] * 2^32), ties to even. Returns how many of them are not below `limit` in absolute value, or not a
 * number: those count as 0. `limit` * (number of shards) must not be above 2^31, so that nothing wraps. */
int64_t kf_sums_add(int64_t *sums, const float *x, int64_t n, float limit);

/* x[i] = (float)((double)sums[i] * 2^-32) */
void kf_sums_float(float *x, const int64_t *sums, int64_t n);

/* out[i] = sum over k of rows[k][i]; out may be one of the rows. */
void kf_sums_total(int64_t *out, const int64_t *const *rows, int count, int64_t n);
#endif
