from libc.stdint cimport int32_t, int64_t, uint64_t


cdef extern from "draw.h" nogil:
    int64_t KF_VOCAB_MAX, KF_BLOCK, KF_GROUP, KF_BUCKETS

    ctypedef struct kf_row:
        uint64_t seed
        int64_t length, min_tokens, top_k
        double temperature, top_p, min_p
        float repetition, presence, frequency
        int in_use, counts_prompt, counts_output
        int64_t num_bias, num_stops
        const int32_t *bias_tokens
        const int32_t *stops
        const float *bias

    ctypedef struct kf_scratch:
        int64_t vocab
        float *logits
        int64_t *weights
        int64_t *sums
        int32_t *kept
        int32_t *list
        int64_t *maxima
        int64_t *buckets

    int kf_see(kf_row *row, int32_t token, int32_t count)
    void kf_row_clear(kf_row *row)
    void kf_sample(const float *logits, int64_t rows, const int32_t *slots, const kf_row *states,
                   const kf_scratch *s, int64_t *tokens)
    double kf_log_sum_exp(const float *x, const kf_scratch *s)


cdef class DrawTable:
    cdef readonly Py_ssize_t max_rows, vocab_size
    cdef kf_row *rows
    cdef kf_scratch scratch
    cdef list free, held
    cdef tuple buffers
    cdef bint sampling

    cdef int check_idle(self) except -1
    cdef int check(self, const int32_t[:] tokens) except -1
    cdef kf_row *row(self, Py_ssize_t slot) except NULL
    cdef int see(self, kf_row *row, const int32_t[:] tokens, int32_t count) except -1
    cdef int extend(self, kf_row *row, int64_t token) except -1
