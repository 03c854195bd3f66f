from libc.stdint cimport int64_t


cdef extern from "team.h" nogil:
    ctypedef struct kf_team:
        pass

    ctypedef struct kf_worker:
        void *scratch

    kf_team *kf_team_new(int threads)
    void kf_team_free(kf_team *team)
    int kf_team_threads(const kf_team *team)
    void *kf_team_scratch(kf_team *team, int64_t bytes)
    void kf_team_run(kf_team *team, void (*fn)(kf_worker *, const void *) noexcept nogil, const void *arg)


cdef class Team:
    cdef kf_team *c

    cdef void *room(self, int64_t bytes) except NULL
    cdef void run(self, void (*fn)(kf_worker *, const void *) noexcept nogil, const void *arg) noexcept nogil


cdef int isa_in_use() noexcept nogil
