/* One instruction set: the products of quantised weights. */
#include "common.h"
#include "qscales.h"

#define FN(x) NAME(x##_f32)
#define T float
#define LDN(p, n) NAME(v_load_n)(p, n)
#define STN(p, n, a) NAME(v_store_n)(p, n, a)
#define RND(a) (a)
#include "finish.h"
#include "qdense.h"
#undef FN
#undef T
#undef LDN
#undef STN
#undef RND

#define FN(x) NAME(x##_bf16)
#define T uint16_t
#define LDN(p, n) NAME(v_load16_n)(p, n)
#define STN(p, n, a) NAME(v_store16_n)(p, n, a)
#define RND(a) NAME(v_round16)(a)
#include "finish.h"
#include "qlinear.h"
static const kf_q_ops NAME(q_ops) = {FN(q_prepare), FN(q_linear), NAME(q_panel_floats),
                                      NAME(q_panel_rows_f32), FN(q_panel)};
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
