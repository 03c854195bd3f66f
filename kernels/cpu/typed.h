/* One instruction set: both element types of every kernel.
 *
 * A group is what one multiply-add instruction takes of the inputs: one float, or a pair of bfloat16. */
#include "common.h"

#ifndef KF_ONLY_BF16
#define FN(x) NAME(x##_f32)
#define T float
#define GROUP 1
#define VG VF /* sixteen outputs' weights, or keys, of one group */
#define LDG(p) NAME(v_load)(p)
#define SETG(p) NAME(v_set1)(*(p))
#define DOT(x, w, acc) NAME(v_fma)(x, w, acc)
#define LD(p) NAME(v_load)(p)
#define LDN(p, n) NAME(v_load_n)(p, n)
#define STN(p, n, a) NAME(v_store_n)(p, n, a)
#define RND(a) (a)
#include "finish.h"
#include "fixed.h"
#include "linear.h"
#include "rowops.h"
#include "route.h"
#include "attend.h"
#include "untyped.h"
#endif

#define FN(x) NAME(x##_bf16)
#define T uint16_t
#define GROUP 2
#define VG VP
#define LDG(p) NAME(v_pairs)(p)
#define SETG(p) NAME(v_pair1)(p)
#define DOT(x, w, acc) NAME(v_dot2)(x, w, acc)
#define LD(p) NAME(v_load16)(p)
#define LDN(p, n) NAME(v_load16_n)(p, n)
#define STN(p, n, a) NAME(v_store16_n)(p, n, a)
#define RND(a) NAME(v_round16)(a)
#include "finish.h"
#include "fixed.h"
#include "linear.h"
#include "rowops.h"
#include "route.h"
#include "attend.h"
#include "untyped.h"

#undef NAME
#undef TARGET
#undef INL
#undef VF
#undef VP
#undef WIDE
#undef UNROLL
#undef EXP_LOWEST
