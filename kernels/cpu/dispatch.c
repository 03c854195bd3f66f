/* The kernels, compiled for every instruction set, and the choice among them.
 *
 * One build runs on any x86-64 (and, in plain C, anywhere): the same source is compiled several times
 * with function attributes. target_clones would do the same in one word, but cannot ask for AVX2 and FMA
 * together, and selecting by arch= compares processor names. All give the same bits. */
#include <math.h>
#include <string.h>

#include "ops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KF_X86 1
#include <immintrin.h>
#endif

#define KF_PRAGMA(x) _Pragma(#x)
#define KF_HEAD_DIM_MAX 512
#define KF_QUERY_BLOCK 48  /* queries of a long step that one thread computes of a head */
#define KF_TILE_ROWS 12
#define KF_FETCH_BYTES (640 << 10) /* of the next head's keys and values that the second level cache has room for */
#define START(pos, window) ((window) > 0 && (pos) + 1 > (window) ? (pos) + 1 - (window) : 0)

typedef struct {
    const int32_t *table;                        /* of the sequence */
    int64_t block_size, head_dim, block_stride;  /* block_stride in elements */
    int64_t base, end;                           /* keys [base, end); base is a multiple of 16 */
    int64_t pad, out_pad;                        /* floats between two rows of scores, of outputs */
    /* What the thread will read after this: K of one head, V plane_bytes behind it, keys [0, next_end). */
    const int32_t *next_table;
    const char *next_k;
    int64_t next_end, plane_bytes;
} kf_tile;

typedef struct {
    int64_t row, head, block, base; /* base: first unit of the row */
} kf_unit;

static inline int64_t query_blocks(const kf_step *step, int64_t row)
{
    return (step->cu_q[row + 1] - step->cu_q[row] + KF_QUERY_BLOCK - 1) / KF_QUERY_BLOCK;
}

#include "vec_plain.h"
#include "typed.h"
#ifdef KF_X86
#include "vec_avx2.h"
#include "typed.h"
#define KF_DOT_BF16 0
#include "vec_avx512.h"
#include "typed.h"
#undef KF_DOT_BF16
#define KF_DOT_BF16 1
#define KF_ONLY_BF16 1
#include "vec_avx512.h"
#include "typed.h"
#endif

static int isa_in_use = -1;

static int isa_best(void)
{
#ifdef KF_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    if (!__builtin_cpu_supports("avx512f"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl")
               ? 3
               : 2;
#else
    return 0;
#endif
}

int kf_set_isa(int isa)
{
    int best = isa_best();
    return isa_in_use = isa < 0 || isa > best ? best : isa;
}

int kf_isa(void) { return isa_in_use < 0 ? kf_set_isa(-1) : isa_in_use; }

const kf_ops *kf_ops_for(int is_bf16)
{
    switch (kf_isa()) {
#ifdef KF_X86
    case 3: return is_bf16 ? &ops_bf16_avx512bf16 : &ops_f32_avx512;
    case 2: return is_bf16 ? &ops_bf16_avx512 : &ops_f32_avx512;
    case 1: return is_bf16 ? &ops_bf16_avx2 : &ops_f32_avx2;
#endif
    default: return is_bf16 ? &ops_bf16_plain : &ops_f32_plain;
    }
}

/* Floats that a thread needs: a tile's queries, outputs and scores (which begin up to 15 keys early and end up to
 * 15 late). */
int64_t kf_attention_floats(int64_t head_dim, int64_t longest)
{
    return KF_TILE_ROWS * (head_dim + (head_dim + 15) + (longest + 32));
}

int64_t kf_head_dim_max(void) { return KF_HEAD_DIM_MAX; }
