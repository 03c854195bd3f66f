from libc.stdint cimport int32_t, int64_t, uint64_t

from kernels.cpu._native cimport Team, kf_worker


cdef extern from "draw.h" nogil:
    int64_t KF_VOCAB_MAX, KF_BLOCK
    double KF_LOG2E, KF_ESTIMATE_OFF, KF_TOKEN_OFF

    ctypedef struct kf_row:
        uint64_t seed
        int64_t length, min_tokens, top_k
        double temperature, top_p, min_p
        float repetition, presence, frequency
        int in_use, counts_prompt, counts_output
        int64_t logprobs
        int64_t num_bias, num_stops, num_bans
        const int32_t *bias_tokens
        const int32_t *stops
        const int32_t *bans
        const float *bias
        const int32_t *mask

    ctypedef struct kf_passes:
        int64_t (*best)(const float *x, int64_t n, int *finite, int32_t *tops)
        int64_t (*sum)(const float *x, int64_t n, double best, double scale, int64_t *sums)

    ctypedef struct kf_scratch:
        const kf_passes *passes
        int64_t blocks
        int64_t *sums
        double *estimates
        int32_t *tops

    ctypedef struct kf_top:
        pass

    ctypedef struct kf_batch:
        const float *logits
        int64_t rows, vocab, top_stride
        const int32_t *slots
        const int32_t *depths
        const int32_t *drafts
        const int32_t *masks
        const kf_row *states
        int isa
        int64_t *tokens
        double *norms
        kf_top *top
        long long next

    int kf_see(kf_row *row, int32_t token, int32_t count)
    void kf_row_clear(kf_row *row)
    const kf_passes *kf_passes_for(int isa)
    int64_t kf_scratch_place(kf_scratch *s, int64_t vocab, char *memory)
    void kf_sample_rows(kf_worker *w, const void *batch)
    double kf_estimate(const kf_scratch *s, const float *x, double best, double scale, bint masked)
    double kf_log_sum_exp(const float *x, const kf_scratch *s)


cdef class DrawTable:
    cdef readonly Py_ssize_t max_rows, vocab_size
    cdef Team team
    cdef kf_row *rows
    cdef list free, held, banned
    cdef bint sampling

    cdef void *room(self) except NULL
    cdef int check_idle(self) except -1
    cdef int check(self, const int32_t[:] tokens) except -1
    cdef int check_drafts(
        self, const int32_t[::1] slots, const int32_t[::1] depths, const int32_t[::1] drafts
    ) except -1
    cdef kf_row *row(self, Py_ssize_t slot) except NULL
    cdef int see(self, kf_row *row, const int32_t[:] tokens, int32_t count) except -1
    cdef int extend(self, kf_row *row, int64_t token) except -1
