/* Quantised weights as the kernels read them.
 *
 * A weight's value is scale * (q - offset) + min. GROUP inputs of 64 outputs (a panel) lie together: the scales of the
 * group, where it has its own, then its q: [8][64][4] bytes, or, two to a byte, [4][64][4] bytes with the quads
 * 2 i in the low and 2 i + 1 in the high half. A quad is four inputs side by side, what one instruction multiplies. */
#ifndef KF_QFORMATS_H
#define KF_QFORMATS_H
#include <stdint.h>

#define KF_QGROUP 32      /* inputs of a group */
#define KF_K_GROUPS 8     /* groups that share the two scales of Q4_K */
#define KF_SCALES_BYTES (KF_PANEL * 4)

/* What a prepared row has of one group: x is scale * an integer, of which `total` is the sum; `sum` is that of the
 * values, scale * total. */
typedef struct {
    float scale, sum;
    int32_t total, unused;
} kf_group;

#define Q_IS8(F) ((F) == KF_INT8_ROW || (F) == KF_INT8_F16)
#define Q_OFFSET(F) (Q_IS8(F) ? 128 : (F) == KF_INT4_F16 ? 8 : 0)
#define Q_HAS_MIN(F) ((F) == KF_INT4_F16_MIN || (F) == KF_INT4_F32_MIN || (F) == KF_INT4_K)
#define Q_VALUE_BYTES(F) (KF_PANEL * KF_QGROUP / (Q_IS8(F) ? 1 : 2))

/* Bytes of a panel of `groups` groups; `span`: groups that share the scales of KF_INT4_F32_MIN. */
static inline int64_t kf_panel_bytes(kf_format format, int64_t groups, int64_t span)
{
    const int64_t values = groups * Q_VALUE_BYTES(format);
    switch (format) {
    case KF_INT8_ROW: return KF_SCALES_BYTES + values;
    case KF_INT8_F16:
    case KF_INT4_F16: return values + groups * KF_SCALES_BYTES / 2;
    case KF_INT4_F16_MIN: return values + groups * KF_SCALES_BYTES;
    case KF_INT4_F32_MIN: return values + (groups + span - 1) / span * 2 * KF_SCALES_BYTES;
    default: return values + groups * 2 * KF_PANEL + (groups + KF_K_GROUPS - 1) / KF_K_GROUPS * KF_SCALES_BYTES;
    }
}

static inline int64_t kf_groups(int64_t k) { return (k + KF_QGROUP - 1) / KF_QGROUP; }

/* Bytes of a prepared row: the integers, then the groups. */
static inline int64_t kf_prepared_bytes(int64_t k) { return kf_groups(k) * (KF_QGROUP + (int64_t)sizeof(kf_group)); }
#endif
