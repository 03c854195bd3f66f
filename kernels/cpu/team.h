/* Threads that share one computation.
 *
 * kf_team_run() runs one function on every thread, the caller among them. Inside, work is taken with kf_next() and
 * operations are separated by kf_barrier(): a thread that is late (its core was taken by somebody else) leaves its
 * share to the others. Waiting spins for some microseconds, within a computation only, and then sleeps. */
#ifndef KF_TEAM_H
#define KF_TEAM_H
#include <stdint.h>

typedef struct kf_team kf_team;

typedef struct {
    kf_team *team;
    int index;     /* of this thread, 0 is the caller */
    uint32_t phase; /* operations passed */
    void *scratch;  /* of this thread: see kf_team_scratch */
} kf_worker;

/* NULL when there is no memory or no more threads are to be had. Not to be used across fork(). */
kf_team *kf_team_new(int threads);
void kf_team_free(kf_team *team);
int kf_team_threads(const kf_team *team);

/* Scratch space of `bytes` for each thread, kept and grown; NULL when there is no memory. Not within a run. Returns the
 * caller's, which has the workers' of the next run behind it. */
void *kf_team_scratch(kf_team *team, int64_t bytes);

void kf_team_run(kf_team *team, void (*fn)(kf_worker *, const void *), const void *arg);

/* Takes up to `grain` of the operation's `total` units: [*begin, *end). False when none is left. */
int kf_next(kf_worker *w, int64_t total, int64_t grain, int64_t *begin, int64_t *end);

/* A piece of work that no thread divides further is done: what a computation that only takes long does again and again,
 * and one that hangs does not. */
void kf_beat(kf_worker *w);

/* How many pieces all computations of this team have done; -1 while none is under way. From any thread. */
int64_t kf_team_beats(const kf_team *team);

/* Everyone has arrived, and sees what the others wrote. */
void kf_barrier(kf_worker *w);
#endif
