/* One instruction set: the products of quantised weights for both element types. */
#include "common.h"

#define FN(x) NAME(x##_f32)
#define T float
#define LDN(p, n) NAME(v_load_n)(p, n)
#define STN(p, n, a) NAME(v_store_n)(p, n, a)
#define RND(a) (a)
#define Q_INTEGERS 0
#include "finish.h"
#include "qlinear.h"
static const kf_q_ops NAME(q_ops_f32) = {FN(q_prepare), FN(q_linear)};
#undef FN
#undef T
#undef LDN
#undef STN
#undef RND
#undef Q_INTEGERS

#define FN(x) NAME(x##_bf16)
#define T uint16_t
#define LDN(p, n) NAME(v_load16_n)(p, n)
#define STN(p, n, a) NAME(v_store16_n)(p, n, a)
#define RND(a) NAME(v_round16)(a)
#define Q_INTEGERS 1
#include "finish.h"
#include "qlinear.h"
static const kf_q_ops NAME(q_ops_bf16) = {FN(q_prepare), FN(q_linear)};
#undef FN
#undef T
#undef LDN
#undef STN
#undef RND
#undef Q_INTEGERS

#undef NAME
#undef TARGET
#undef INL
#undef VF
#undef VP
#undef VQ
#undef WIDE
#undef UNROLL
#undef EXP_LOWEST
