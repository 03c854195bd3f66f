/* All-reduce between processes of one host, in memory that they share.
 *
 * Each rank writes its contribution straight into its place of the memory and calls kf_exchange_reduce(); when that
 * returns, the sum over all ranks is there. Small sums are made by everybody for himself, after one barrier. Of large
 * ones each rank makes a part, and a second barrier follows. Contributions and sums have two places each that take
 * turns: a rank that is one call ahead writes where nobody reads any more.
 *
 * Waiting spins for some microseconds, then sleeps, and ends at a deadline or when somebody aborts. Either way the
 * exchange is over: its ranks may be in different calls, and those that are left begin another one. */
#ifndef KF_EXCHANGE_H
#define KF_EXCHANGE_H
#include <stdint.h>

typedef struct kf_exchange kf_exchange;

enum { KF_RANKS_MAX = 64 };
enum { KF_REDUCED = 0, KF_ABORTED = -1, KF_LATE = -2 };

/* Bytes of the memory for so many ranks and numbers. */
int64_t kf_exchange_bytes(int ranks, int64_t numbers_max);

/* `memory`: shared, of that size, and zero before the first rank attaches. NULL when there is no memory, or when it was
 * attached to for another number of ranks or numbers. */
kf_exchange *kf_exchange_attach(void *memory, int ranks, int rank, int64_t numbers_max);
void kf_exchange_detach(kf_exchange *e);

/* Where this rank's next contribution goes. */
int64_t *kf_exchange_place(kf_exchange *e);

/* The first `n` numbers of everybody's contribution are added up: *sum, which holds until the next call has returned. Every
 * rank calls with the same n, at most numbers_max. */
int kf_exchange_reduce(kf_exchange *e, int64_t n, int64_t timeout_ns, const int64_t **sum);

/* Ends what everybody waits for, now and later. From any thread of any process that has the memory. */
void kf_exchange_abort(kf_exchange *e);
int kf_exchange_aborted(const kf_exchange *e);

/* The first rank that was not there when the last call was late; -1 otherwise. */
int kf_exchange_missing(const kf_exchange *e);
#endif
