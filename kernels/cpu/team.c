#define _GNU_SOURCE
#include "team.h"

#include "denormals.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
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

#define SPINS 2000     /* some 20 to 60 us: longer than the threads drift apart, shorter than a time slice */
#define LATE_NS 250000 /* longer than a thread computes between two looks at the others */
#define YIELD_EVERY 64 /* the thread that is waited for may be queued behind this one */
#define LINE 64

/* Written by one thread only, and read by whoever watches over the computation. */
typedef struct {
    _Alignas(LINE) atomic_llong count;
} beat;

struct kf_team {
    int threads;
    void (*fn)(kf_worker *, const void *);
    const void *arg;
    char *scratch;
    int64_t scratch_bytes; /* of one thread, a multiple of LINE */
    pthread_t *ids;
    int kept_off; /* the processor that the helpers keep off; -1: none */
    _Alignas(LINE) atomic_uint job;       /* counts runs; odd bit of nothing: a futex */
    atomic_int stop;
    _Alignas(LINE) atomic_uint generation; /* of the barrier: a futex */
    _Alignas(LINE) atomic_int arrived;
    atomic_int sleepers;
    /* What is taken of an operation. Four, so that the next operation's is clear while a late thread still looks. */
    struct { _Alignas(LINE) atomic_llong next; } taken[4];
    beat *beats; /* one for each thread */
    atomic_int running;
};

typedef struct {
    kf_team *team;
    int index;
} start;

static void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* True when the word has changed. */
static int spin_while(atomic_uint *word, unsigned value)
{
    for (int i = 1; i <= SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value)
            return 1;
        if (i % YIELD_EVERY)
            relax();
        else
            sched_yield();
    }
    return 0;
}

/* Until the word changes, or for `limit` if it is given; may also end for no reason. */
static void sleep_while(atomic_uint *word, unsigned value, const struct timespec *limit)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, limit, NULL, 0);
}

static void wake_all(atomic_uint *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void kf_beat(kf_worker *w)
{
    atomic_llong *count = &w->team->beats[w->index].count;
    atomic_store_explicit(count, atomic_load_explicit(count, memory_order_relaxed) + 1, memory_order_relaxed);
}

int64_t kf_team_beats(const kf_team *t)
{
    if (!atomic_load(&t->running))
        return -1;
    int64_t sum = 0;
    for (int i = 0; i < t->threads; i++)
        sum += atomic_load_explicit(&t->beats[i].count, memory_order_relaxed);
    return sum;
}

int kf_next(kf_worker *w, int64_t total, int64_t grain, int64_t *begin, int64_t *end)
{
    kf_beat(w);
    atomic_llong *next = &w->team->taken[w->phase & 3].next;
    if (atomic_load_explicit(next, memory_order_relaxed) >= total)
        return 0;
    *begin = atomic_fetch_add_explicit(next, grain, memory_order_relaxed);
    *end = *begin + grain < total ? *begin + grain : total;
    return *begin < total;
}

/* A sleeper is often woken where its waker runs, and waits there for it although another processor is idle. So the
 * helpers keep off the caller's. */
static void keep_off_callers_cpu(kf_team *t)
{
    const int cpu = sched_getcpu();
    if (cpu < 0 || cpu == t->kept_off)
        return;
    t->kept_off = cpu;
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof others, &others)) /* the caller's, which is never changed here */
        return;
    CPU_CLR(cpu, &others);
    if (!CPU_COUNT(&others))
        return;
    for (int i = 1; i < t->threads; i++)
        pthread_setaffinity_np(t->ids[i], sizeof others, &others);
}

/* The caller has nothing left to do, and a helper has probably lost its processor to somebody else: the caller's is
 * free for it. With several helpers nobody knows which one is late; then they may go anywhere. */
static void lend_callers_cpu(kf_team *t)
{
    cpu_set_t all, here;
    const int cpu = sched_getcpu();
    if (cpu < 0 || sched_getaffinity(0, sizeof all, &all))
        return;
    t->kept_off = -1;
    CPU_ZERO(&here);
    CPU_SET(cpu, &here);
    for (int i = 1; i < t->threads; i++)
        pthread_setaffinity_np(t->ids[i], sizeof all, t->threads == 2 ? &here : &all);
}

void kf_barrier(kf_worker *w)
{
    kf_team *t = w->team;
    const unsigned generation = atomic_load(&t->generation);
    const uint32_t phase = w->phase++;
    if (atomic_fetch_add(&t->arrived, 1) + 1 == t->threads) {
        atomic_store_explicit(&t->taken[(phase + 2) & 3].next, 0, memory_order_relaxed);
        atomic_store(&t->arrived, 0);
        atomic_fetch_add(&t->generation, 1);
        if (atomic_load(&t->sleepers))
            wake_all(&t->generation);
        return;
    }
    if (spin_while(&t->generation, generation))
        return;
    atomic_fetch_add(&t->sleepers, 1);
    if (w->index == 0) {
        sleep_while(&t->generation, generation, &(struct timespec){.tv_nsec = LATE_NS});
        if (atomic_load(&t->generation) == generation)
            lend_callers_cpu(t);
    }
    while (atomic_load(&t->generation) == generation)
        sleep_while(&t->generation, generation, NULL);
    atomic_fetch_sub(&t->sleepers, 1);
}

static void *scratch_of(const kf_team *t, int index)
{
    return t->scratch ? t->scratch + index * t->scratch_bytes : NULL;
}

static void *thread_main(void *p)
{
    start s = *(start *)p;
    free(p);
    kf_team *t = s.team;
    pthread_setname_np(pthread_self(), "kf-compute"); /* for whoever looks for it in `top -H` */
    kf_denormals(1); /* as the dot product instructions have it: so every instruction set computes the same */
    for (unsigned seen = 0;;) {
        while (atomic_load(&t->job) == seen)
            sleep_while(&t->job, seen, NULL);
        seen++;
        if (atomic_load(&t->stop))
            return NULL;
        kf_worker w = {t, s.index, 0, scratch_of(t, s.index)};
        t->fn(&w, t->arg);
        kf_barrier(&w);
    }
}

void kf_team_run(kf_team *t, void (*fn)(kf_worker *, const void *), const void *arg)
{
    const uint64_t old = kf_denormals(1);
    kf_worker w = {t, 0, 0, scratch_of(t, 0)};
    for (int i = 0; i < 4; i++)
        atomic_store_explicit(&t->taken[i].next, 0, memory_order_relaxed);
    t->fn = fn;
    t->arg = arg;
    atomic_store(&t->running, 1);
    if (t->threads > 1) {
        keep_off_callers_cpu(t);
        atomic_fetch_add(&t->job, 1);
        wake_all(&t->job);
    }
    fn(&w, arg);
    kf_barrier(&w);
    atomic_store(&t->running, 0);
    kf_denormals_restore(old);
}

kf_team *kf_team_new(int threads)
{
    kf_team *t = threads < 1 ? NULL : aligned_alloc(LINE, sizeof *t);
    if (!t)
        return NULL;
    *t = (kf_team){.threads = 1, .kept_off = -1};
    t->ids = calloc((size_t)threads, sizeof *t->ids);
    t->beats = aligned_alloc(LINE, (size_t)threads * sizeof *t->beats);
    if (t->beats)
        memset(t->beats, 0, (size_t)threads * sizeof *t->beats);
    for (; t->ids && t->beats && t->threads < threads; t->threads++) {
        start *s = malloc(sizeof *s);
        if (!s)
            break;
        *s = (start){t, t->threads};
        if (pthread_create(&t->ids[t->threads], NULL, thread_main, s)) {
            free(s);
            break;
        }
    }
    if (t->ids && t->beats && t->threads == threads)
        return t;
    kf_team_free(t);
    return NULL;
}

void kf_team_free(kf_team *t)
{
    atomic_store(&t->stop, 1);
    atomic_fetch_add(&t->job, 1);
    wake_all(&t->job);
    for (int i = 1; i < t->threads; i++)
        pthread_join(t->ids[i], NULL);
    free(t->ids);
    free(t->beats);
    free(t->scratch);
    free(t);
}

int kf_team_threads(const kf_team *t) { return t->threads; }

void *kf_team_scratch(kf_team *t, int64_t bytes)
{
    bytes = (bytes + LINE - 1) / LINE * LINE;
    if (bytes > t->scratch_bytes) {
        char *more = aligned_alloc(LINE, (size_t)(bytes * t->threads));
        if (!more)
            return NULL;
        free(t->scratch);
        t->scratch = more;
        t->scratch_bytes = bytes;
    }
    return t->scratch;
}

