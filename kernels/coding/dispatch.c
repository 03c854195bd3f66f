/* The loops, compiled for every instruction set, and the choice among them. All give the same bytes. */
#include <stddef.h>
#include <string.h>

#include "coding.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KF_X86 1
#include <immintrin.h>
#endif

#include "vec_plain.h"
#include "loops.h"
#ifdef KF_X86
#include "vec_avx2.h"
#include "loops.h"
#define KF_GFNI 0
#include "vec_avx512.h"
#include "loops.h"
#undef KF_GFNI
#define KF_GFNI 1
#include "vec_avx512.h"
#include "loops.h"
#endif

kf_product kf_products[256];
_Alignas(64) const uint8_t kf_zeros[256];
static int level_in_use;

static uint8_t product(int a, int b)
{
    int sum = 0;
    for (; b; b >>= 1) {
        sum ^= b & 1 ? a : 0;
        a = a << 1 ^ (a & 0x80 ? 0x11d : 0);
    }
    return (uint8_t)sum;
}

static int level_best(void)
{
#ifdef KF_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw"))
        return 1;
    return __builtin_cpu_supports("gfni") ? 3 : 2;
#else
    return 0;
#endif
}

int kf_coding_set_level(int level)
{
    int best = level_best();
    return level_in_use = level < 0 || level > best ? best : level;
}

void kf_coding_init(void)
{
    for (int c = 0; c < 256; c++) {
        kf_product *of = &kf_products[c];
        for (int i = 0; i < 16; i++) {
            of->low[i] = product(c, i);
            of->high[i] = product(c, i << 4);
        }
        /* Byte 7 - i of the matrix selects the bits of the factor that make up bit i of the product. */
        of->affine = 0;
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 8; j++)
                of->affine |= (uint64_t)(product(c, 1 << j) >> i & 1) << (8 * (7 - i) + j);
    }
    kf_coding_set_level(-1);
}

const kf_coding_ops *kf_coding_ops_in_use(void)
{
    switch (level_in_use) {
#ifdef KF_X86
    case 3: return &ops_gfni;
    case 2: return &ops_avx512;
    case 1: return &ops_avx2;
#endif
    default: return &ops_plain;
    }
}

void kf_coding_fence(void)
{
#ifdef KF_X86
    _mm_sfence();
#endif
}
