#include "sums.h"

#include <math.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define KF_X86 1
#include <immintrin.h>
#endif

#define SCALE 4294967296.0            /* 2^32 */
#define ROUND 6755399441055744.0      /* 1.5 * 2^52: adding it rounds to a whole number, which its low bits then are */
#define ROUND_BITS 0x4338000000000000LL

static int level_in_use;

static int level_best(void)
{
#ifdef KF_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

int kf_sums_set_level(int level)
{
    const int best = level_best();
    return level_in_use = level < 0 || level > best ? best : level;
}

/* A float32 times 2^32 is exact in float64, and below 2^63 for |x| < 2^31. */
static int64_t add_plain(int64_t *sums, const float *x, int64_t n, float limit)
{
    int64_t beyond = 0;
    for (int64_t i = 0; i < n; i++) {
        if (fabsf(x[i]) < limit)
            sums[i] += (int64_t)rint((double)x[i] * SCALE);
        else
            beyond++;
    }
    return beyond;
}

static void float_plain(float *x, const int64_t *sums, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)((double)sums[i] * (1.0 / SCALE));
}

#ifdef KF_X86
/* AVX2 has no conversion between float64 and 64-bit integers. The whole part of x fits 32 bits; what is behind the point
 * is exact in float64, times 2^32 below 2^33, where adding ROUND rounds it and leaves the integer in the low bits. */
__attribute__((target("avx2"))) static int64_t add_avx2(int64_t *sums, const float *x, int64_t n, float limit)
{
    const __m128 bound = _mm_set1_ps(limit), sign = _mm_set1_ps(-0.0f);
    const __m256d scale = _mm256_set1_pd(SCALE), round = _mm256_set1_pd(ROUND);
    const __m256i round_bits = _mm256_set1_epi64x(ROUND_BITS);
    int64_t beyond = 0, i = 0;
    for (; i + 4 <= n; i += 4) {
        __m128 four = _mm_loadu_ps(x + i);
        const __m128 within = _mm_cmplt_ps(_mm_andnot_ps(sign, four), bound);
        const int mask = _mm_movemask_ps(within);
        if (__builtin_expect(mask != 15, 0)) {
            beyond += 4 - __builtin_popcount((unsigned)mask);
            four = _mm_and_ps(four, within);
        }
        const __m256d wide = _mm256_cvtps_pd(four);
        const __m128i whole = _mm256_cvttpd_epi32(wide);
        const __m256d rest = _mm256_mul_pd(_mm256_sub_pd(wide, _mm256_cvtepi32_pd(whole)), scale);
        const __m256i low = _mm256_sub_epi64(_mm256_castpd_si256(_mm256_add_pd(rest, round)), round_bits);
        const __m256i high = _mm256_slli_epi64(_mm256_cvtepi32_epi64(whole), 32);
        __m256i *at = (__m256i *)(sums + i);
        _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), _mm256_add_epi64(high, low)));
    }
    return beyond + add_plain(sums + i, x + i, n - i, limit);
}

/* high * 2^32 + low, of which each is exact in float64: their sum is rounded once, as a conversion of the whole is. */
__attribute__((target("avx2"))) static void float_avx2(float *x, const int64_t *sums, int64_t n)
{
    const __m256i order = _mm256_setr_epi32(1, 3, 5, 7, 0, 2, 4, 6);
    const __m256d offset = _mm256_set1_pd(4503599627370496.0); /* 2^52: has a 32-bit number in its low bits */
    const __m256d scale = _mm256_set1_pd(SCALE), back = _mm256_set1_pd(1.0 / SCALE);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const __m256i halves =
            _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(sums + i)), order);
        const __m256d high = _mm256_mul_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(halves)), scale);
        const __m256i low = _mm256_cvtepu32_epi64(_mm256_extracti128_si256(halves, 1));
        const __m256d low_wide =
            _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(low, _mm256_castpd_si256(offset))), offset);
        _mm_storeu_ps(x + i, _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_add_pd(high, low_wide), back)));
    }
    float_plain(x + i, sums + i, n - i);
}
#endif

int64_t kf_sums_add(int64_t *sums, const float *x, int64_t n, float limit)
{
#ifdef KF_X86
    if (level_in_use)
        return add_avx2(sums, x, n, limit);
#endif
    return add_plain(sums, x, n, limit);
}

void kf_sums_float(float *x, const int64_t *sums, int64_t n)
{
#ifdef KF_X86
    if (level_in_use) {
        float_avx2(x, sums, n);
        return;
    }
#endif
    float_plain(x, sums, n);
}

#define TOTALS(name, target)                                                                                          \
    target static void name(int64_t *out, const int64_t *const *rows, int count, int64_t n)                           \
    {                                                                                                                 \
        for (int64_t begin = 0; begin < n; begin += 512) { /* of out, which stays in the first cache */               \
            const int64_t end = begin + 512 < n ? begin + 512 : n;                                                    \
            if (count == 1)                                                                                           \
                for (int64_t i = begin; i < end; i++)                                                                 \
                    out[i] = rows[0][i];                                                                              \
            else                                                                                                      \
                for (int64_t i = begin; i < end; i++)                                                                 \
                    out[i] = rows[0][i] + rows[1][i];                                                                 \
            for (int k = 2; k < count; k++)                                                                           \
                for (int64_t i = begin; i < end; i++)                                                                 \
                    out[i] += rows[k][i];                                                                             \
        }                                                                                                             \
    }

TOTALS(total_plain, )
#ifdef KF_X86
TOTALS(total_avx2, __attribute__((target("avx2"))))
#endif

void kf_sums_total(int64_t *out, const int64_t *const *rows, int count, int64_t n)
{
#ifdef KF_X86
    if (level_in_use) {
        total_avx2(out, rows, count, n);
        return;
    }
#endif
    total_plain(out, rows, count, n);
}
