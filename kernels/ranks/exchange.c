#define _GNU_SOURCE
#include "exchange.h"

#include "sums.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LINE 64
#define SPINS 2000
#define YIELD_EVERY 64
#define LOOK_NS 5000000 /* between two looks, while asleep, whether somebody has aborted */
#define ALONE_MAX 2048 /* numbers up to which everybody adds all of them: a barrier takes longer */

/* Of one rank, written by it only. A call passes two steps: contributed, and its part of the sum is made. */
typedef struct {
    _Alignas(LINE) atomic_uint step; /* a futex */
} progress;

typedef struct {
    _Alignas(LINE) atomic_int ranks;
    atomic_llong numbers_max;
    _Alignas(LINE) atomic_uint aborted;
    _Alignas(LINE) atomic_int sleepers;
    progress of[KF_RANKS_MAX];
} header;

struct kf_exchange {
    header *shared;
    int64_t *contributions; /* [2][ranks][numbers_max] */
    int64_t *sums;          /* [2][numbers_max] */
    int64_t *own;           /* [2][ALONE_MAX], not shared */
    int ranks, rank, missing;
    int64_t numbers_max;
    unsigned calls;
};

static int64_t padded(int64_t numbers)
{
    const int64_t line = LINE / (int64_t)sizeof(int64_t);
    return (numbers + line - 1) / line * line;
}

int64_t kf_exchange_bytes(int ranks, int64_t numbers_max)
{
    return (int64_t)sizeof(header) + 2 * (ranks + 1) * padded(numbers_max) * (int64_t)sizeof(int64_t);
}

kf_exchange *kf_exchange_attach(void *memory, int ranks, int rank, int64_t numbers_max)
{
    header *shared = memory;
    if (ranks < 1 || ranks > KF_RANKS_MAX || rank < 0 || rank >= ranks || numbers_max < 1)
        return NULL;
    int no_ranks = 0;
    long long no_numbers = 0; /* all write the same: who comes first does not matter */
    if (!atomic_compare_exchange_strong(&shared->ranks, &no_ranks, ranks) && no_ranks != ranks)
        return NULL;
    if (!atomic_compare_exchange_strong(&shared->numbers_max, &no_numbers, numbers_max) && no_numbers != numbers_max)
        return NULL;
    kf_exchange *e = calloc(1, sizeof *e);
    int64_t *own = aligned_alloc(LINE, 2 * ALONE_MAX * sizeof(int64_t));
    if (!e || !own) {
        free(e);
        free(own);
        return NULL;
    }
    *e = (kf_exchange){.shared = shared, .ranks = ranks, .rank = rank, .missing = -1,
                       .numbers_max = padded(numbers_max), .own = own};
    e->contributions = (int64_t *)((char *)memory + sizeof(header));
    e->sums = e->contributions + 2 * ranks * e->numbers_max;
    return e;
}

void kf_exchange_detach(kf_exchange *e)
{
    if (e)
        free(e->own);
    free(e);
}

static int64_t *contribution(const kf_exchange *e, int rank)
{
    return e->contributions + ((int64_t)(e->calls & 1) * e->ranks + rank) * e->numbers_max;
}

int64_t *kf_exchange_place(kf_exchange *e)
{
    return contribution(e, e->rank);
}

static void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wake(atomic_uint *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); /* not PRIVATE: of several processes */
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void pass(kf_exchange *e, unsigned step)
{
    atomic_uint *mine = &e->shared->of[e->rank].step;
    atomic_store(mine, step);
    if (atomic_load(&e->shared->sleepers))
        wake(mine);
}

/* Steps are compared by their difference: they wrap after 2^31 calls. */
static int reached(const kf_exchange *e, int rank, unsigned step)
{
    return (int)(atomic_load_explicit(&e->shared->of[rank].step, memory_order_acquire) - step) >= 0;
}

static int wait_for(kf_exchange *e, int rank, unsigned step, int64_t deadline_ns)
{
    header *shared = e->shared;
    for (int i = 1; i <= SPINS; i++) {
        if (reached(e, rank, step))
            return KF_REDUCED;
        if (i % YIELD_EVERY)
            relax();
        else
            sched_yield();
    }
    atomic_fetch_add(&shared->sleepers, 1);
    int outcome = KF_REDUCED;
    for (;;) {
        const unsigned seen = atomic_load(&shared->of[rank].step);
        if ((int)(seen - step) >= 0)
            break;
        if (atomic_load(&shared->aborted)) {
            outcome = KF_ABORTED;
            break;
        }
        const int64_t left_ns = deadline_ns - now_ns();
        if (left_ns <= 0) {
            outcome = KF_LATE;
            break;
        }
        const struct timespec limit = {.tv_nsec = left_ns < LOOK_NS ? left_ns : LOOK_NS};
        syscall(SYS_futex, &shared->of[rank].step, FUTEX_WAIT, seen, &limit, NULL, 0);
    }
    atomic_fetch_sub(&shared->sleepers, 1);
    return outcome;
}

static int barrier(kf_exchange *e, unsigned step, int64_t deadline_ns)
{
    pass(e, step);
    for (int i = 1; i < e->ranks; i++) { /* beginning with different ones */
        const int other = (e->rank + i) % e->ranks;
        const int outcome = wait_for(e, other, step, deadline_ns);
        if (outcome == KF_LATE) {
            e->missing = other;
            kf_exchange_abort(e); /* those who were there must not wait for each other in the next call */
        }
        if (outcome != KF_REDUCED)
            return outcome;
    }
    return KF_REDUCED;
}

int kf_exchange_reduce(kf_exchange *e, int64_t n, int64_t timeout_ns, const int64_t **sum)
{
    const int64_t deadline_ns = now_ns() + timeout_ns;
    const unsigned step = 2 * e->calls;
    e->missing = -1;
    if (atomic_load(&e->shared->aborted))
        return KF_ABORTED;
    int outcome = barrier(e, step + 1, deadline_ns);
    if (outcome != KF_REDUCED)
        return outcome;
    const int64_t *rows[KF_RANKS_MAX];
    if (n <= ALONE_MAX || e->ranks == 1) {
        for (int k = 0; k < e->ranks; k++)
            rows[k] = contribution(e, k);
        int64_t *out = e->ranks == 1 ? contribution(e, 0) : e->own + (e->calls & 1) * ALONE_MAX;
        if (e->ranks > 1)
            kf_sums_total(out, rows, e->ranks, n);
        *sum = out;
        e->calls++;
        return KF_REDUCED;
    }
    int64_t *out = e->sums + (e->calls & 1) * e->numbers_max;
    const int64_t part = padded((n + e->ranks - 1) / e->ranks);
    const int64_t begin = part * e->rank < n ? part * e->rank : n;
    const int64_t end = begin + part < n ? begin + part : n;
    for (int k = 0; k < e->ranks; k++)
        rows[k] = contribution(e, k) + begin;
    kf_sums_total(out + begin, rows, e->ranks, end - begin);
    outcome = barrier(e, step + 2, deadline_ns);
    if (outcome != KF_REDUCED)
        return outcome;
    *sum = out;
    e->calls++;
    return KF_REDUCED;
}

void kf_exchange_abort(kf_exchange *e)
{
    atomic_store(&e->shared->aborted, 1);
    for (int k = 0; k < e->ranks; k++)
        wake(&e->shared->of[k].step);
}

int kf_exchange_aborted(const kf_exchange *e)
{
    return atomic_load(&e->shared->aborted) != 0;
}

int kf_exchange_missing(const kf_exchange *e)
{
    return e->missing;
}
