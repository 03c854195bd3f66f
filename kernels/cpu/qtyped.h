/* One instruction set: the products of quantised weights. */
#include "common.h"
#include "qscales.h"
#include "qdense.h"

#define FN(x) NAME(x##_bf16)
#define T uint16_t
#define LDN(p, n) NAME(v_load16_n)(p, n)
#define STN(p, n, a) NAME(v_store16_n)(p, n, a)
#define RND(a) NAME(v_round16)(a)
#include "finish.h"
#include "qlinear.h"
static const kf_q_ops NAME(q_ops) = {FN(q_prepare), FN(q_linear), NAME(q_panel_floats)};
#undef FN
#undef T
#undef LDN
#undef STN
#undef RND

#undef NAME
#undef TARGET
#undef INL
#undef VF
#undef VP
#undef VQ
#undef WIDE
#undef UNROLL
#undef EXP_LOWEST
