/* One instruction set: both element types of every kernel. */
#include "common.h"

#define FN(x) NAME(x##_f32)
#define T float
#define LD(p) NAME(v_load)(p)
#define LDN(p, n) NAME(v_load_n)(p, n)
#define STN(p, n, a) NAME(v_store_n)(p, n, a)
#define RND(a) (a)
#define TO_FLOAT(x) (x)
INL const float *FN(widen)(const float *x, int64_t n, float *scratch)
{
    (void)n, (void)scratch;
    return x;
}
#include "linear.h"
#include "rowops.h"
#include "attend.h"
#undef FN
#undef T
#undef LD
#undef LDN
#undef STN
#undef RND
#undef TO_FLOAT

#define FN(x) NAME(x##_bf16)
#define T uint16_t
#define LD(p) NAME(v_load16)(p)
#define LDN(p, n) NAME(v_load16_n)(p, n)
#define STN(p, n, a) NAME(v_store16_n)(p, n, a)
#define RND(a) NAME(v_round16)(a)
#define TO_FLOAT(x) kf_widen(x)
static TARGET const float *FN(widen)(const uint16_t *x, int64_t n, float *scratch)
{
    for (int64_t i = 0; i < n; i += 16)
        NAME(v_store_n)(scratch + i, n - i, LDN(x + i, n - i));
    return scratch;
}
#include "linear.h"
#include "rowops.h"
#include "attend.h"
#undef FN
#undef T
#undef LD
#undef LDN
#undef STN
#undef RND
#undef TO_FLOAT

#undef NAME
#undef TARGET
#undef INL
#undef VF
#undef WIDE
#undef EXP_LOWEST
