/* CRC-32 as zlib has it, at the speed of memory.
 *
 * One definition on every machine: where the processor multiplies without carries, 64 bytes are folded at a time
 * (V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009), elsewhere
 * eight tables take 8 bytes at a time (M. Kounavis and F. Berry, "Novel Table Lookup-Based Algorithms for
 * High-Performance CRC Generation", 2008). */

#ifndef KF_CRC32_H
#define KF_CRC32_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KF_CRC_POLYNOMIAL 0xEDB88320u /* bits reversed */
#define KF_FOLD 64                    /* bytes of four vectors */

static uint32_t kf_crc_tables[8][256];
static int kf_crc_folds;

/* Once, before anything else here. `folding` 0: the tables only, as on a processor without the instruction. */
static void kf_crc32_init(int folding)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? KF_CRC_POLYNOMIAL : 0);
        kf_crc_tables[0][byte] = crc;
    }
    for (int table = 1; table < 8; table++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t crc = kf_crc_tables[table - 1][byte];
            kf_crc_tables[table][byte] = (crc >> 8) ^ kf_crc_tables[0][crc & 0xFF];
        }
    kf_crc_folds = 0;
#if defined(__x86_64__)
    kf_crc_folds = folding && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#endif
}

static uint32_t kf_crc32_by_tables(uint32_t crc, const uint8_t *data, size_t size)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int byte = 0; byte < 8; byte++)
            crc ^= kf_crc_tables[7 - byte][(word >> 8 * byte) & 0xFF];
    }
#endif
    for (; size; data++, size--)
        crc = (crc >> 8) ^ kf_crc_tables[0][(crc ^ *data) & 0xFF];
    return crc;
}

#if defined(__x86_64__)
/* `by` has two powers of x modulo the polynomial: where the two halves of `sum` come to lie at `next`. */
__attribute__((target("pclmul,sse4.1"))) static inline __m128i kf_fold(__m128i sum, __m128i by, __m128i next)
{
    __m128i low = _mm_clmulepi64_si128(sum, by, 0x00), high = _mm_clmulepi64_si128(sum, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* `size` is a multiple of 16 and at least KF_FOLD. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t kf_crc32_by_folding(uint32_t crc, const uint8_t *data,
                                                                            size_t size)
{
    const __m128i by_512 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4); /* x^(512-32), x^(512+32) */
    const __m128i by_128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0); /* x^(128-32), x^(128+32) */
    const __m128i by_64 = _mm_set_epi64x(0, 0x0163cd6124);             /* x^64 */
    const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low_words = _mm_setr_epi32(~0, 0, ~0, 0);
    const __m128i *from = (const __m128i *)data, *end = (const __m128i *)(data + size);
    __m128i a = _mm_xor_si128(_mm_loadu_si128(from), _mm_cvtsi32_si128((int)crc));
    __m128i b = _mm_loadu_si128(from + 1), c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    for (from += 4; end - from >= 4; from += 4) {
        a = kf_fold(a, by_512, _mm_loadu_si128(from));
        b = kf_fold(b, by_512, _mm_loadu_si128(from + 1));
        c = kf_fold(c, by_512, _mm_loadu_si128(from + 2));
        d = kf_fold(d, by_512, _mm_loadu_si128(from + 3));
    }
    a = kf_fold(kf_fold(kf_fold(a, by_128, b), by_128, c), by_128, d);
    for (; from < end; from++)
        a = kf_fold(a, by_128, _mm_loadu_si128(from));
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_128, 0x10)); /* 128 bits to 96 */
    b = _mm_srli_si128(a, 4);                                                       /* 96 to 64 */
    a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low_words), by_64, 0x00), b);
    b = _mm_clmulepi64_si128(_mm_and_si128(a, low_words), barrett, 0x10); /* 64 to 32 */
    b = _mm_clmulepi64_si128(_mm_and_si128(b, low_words), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(a, b), 1);
}
#endif

/* The CRC-32 of what had CRC-32 `value` and then `data`; `value` 0 begins. */
static uint32_t kf_crc32(uint32_t value, const uint8_t *data, size_t size)
{
    uint32_t crc = ~value;
#if defined(__x86_64__)
    if (kf_crc_folds && size >= KF_FOLD) {
        size_t folded = size & ~(size_t)15;
        crc = kf_crc32_by_folding(crc, data, folded);
        data += folded;
        size -= folded;
    }
#endif
    return ~kf_crc32_by_tables(crc, data, size);
}

/* The CRC-32 of `size` bytes, which are copied on the way, while they are in the cache. */
static uint32_t kf_crc32_copy(uint8_t *to, const uint8_t *from, size_t size)
{
    uint32_t value = 0;
    while (size) {
        size_t part = size < 16384 ? size : 16384;
        memcpy(to, from, part);
        value = kf_crc32(value, to, part);
        to += part;
        from += part;
        size -= part;
    }
    return value;
}

#endif
