/* Whether a thread takes denormals for zero. */
#ifndef KF_DENORMALS_H
#define KF_DENORMALS_H
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static inline void kf_denormals_restore(uint64_t old)
{
#if defined(__x86_64__)
    _mm_setcsr((unsigned)old);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(old));
#else
    (void)old;
#endif
}

/* From now on denormals are zero, or are not; returns what kf_denormals_restore() takes. */
static inline uint64_t kf_denormals(int zero)
{
    uint64_t old = 0, bits = 0;
#if defined(__x86_64__)
    old = _mm_getcsr();
    bits = 0x8040;
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    bits = 1u << 24;
#endif
    kf_denormals_restore(zero ? old | bits : old & ~bits);
    return old;
}
#endif
