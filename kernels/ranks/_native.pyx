# cython: boundscheck=False, wraparound=False, cdivision=True
"""Thin binding of sums.h and exchange.h. The interpreter is left to others while ranks wait for each other."""

import mmap
import os

import numpy as np

from libc.stdint cimport int64_t


cdef extern from "sums.h" nogil:
    int kf_sums_set_level(int level)
    int64_t kf_sums_add(int64_t *sums, const float *x, int64_t n, float limit)
    void kf_sums_float(float *x, const int64_t *sums, int64_t n)

cdef extern from "exchange.h" nogil:
    ctypedef struct kf_exchange:
        pass
    int KF_RANKS_MAX, KF_REDUCED, KF_ABORTED, KF_LATE
    int64_t kf_exchange_bytes(int ranks, int64_t numbers_max)
    kf_exchange *kf_exchange_attach(void *memory, int ranks, int rank, int64_t numbers_max)
    void kf_exchange_detach(kf_exchange *e)
    int64_t *kf_exchange_place(kf_exchange *e)
    int kf_exchange_reduce(kf_exchange *e, int64_t n, int64_t timeout_ns, const int64_t **total)
    void kf_exchange_abort(kf_exchange *e)
    int kf_exchange_aborted(const kf_exchange *e)
    int kf_exchange_missing(const kf_exchange *e)

RANKS_MAX = KF_RANKS_MAX
kf_sums_set_level(-1)


def set_level(int level):
    """Limits the instruction set: 0 C, 1 AVX2, -1 the best. Returns what is in use."""
    return kf_sums_set_level(level)


def add(int64_t[::1] sums, const float[::1] partials, float limit):
    """sums += partials in fixed point. Returns how many partials do not lie within the limit."""
    if sums.shape[0] != partials.shape[0]:
        raise ValueError(f"{partials.shape[0]} partial sums cannot be added to {sums.shape[0]} sums")
    cdef int64_t n = sums.shape[0], beyond = 0
    if n:
        with nogil:
            beyond = kf_sums_add(&sums[0], &partials[0], n, limit)
    return beyond


def to_float(const int64_t[::1] sums, float[::1] out):
    """out = sums as float32."""
    if sums.shape[0] != out.shape[0]:
        raise ValueError(f"{sums.shape[0]} sums do not fit {out.shape[0]} numbers")
    if sums.shape[0]:
        with nogil:
            kf_sums_float(&out[0], &sums[0], sums.shape[0])


def memory_bytes(int ranks, int64_t numbers_max):
    """Of the shared memory of an exchange."""
    return kf_exchange_bytes(ranks, numbers_max)


cdef class Exchange:
    """One rank's end; see exchange.py."""

    cdef kf_exchange *handle
    cdef object memory
    cdef unsigned char[::1] view
    cdef readonly int ranks
    cdef readonly int rank
    cdef readonly int64_t numbers_max

    def __cinit__(self, int fd, int ranks, int rank, int64_t numbers_max):
        if not 1 <= ranks <= KF_RANKS_MAX or not 0 <= rank < ranks or numbers_max < 1:
            raise ValueError(f"rank {rank} of {ranks} with {numbers_max} numbers: at most {KF_RANKS_MAX} ranks")
        cdef int64_t size = kf_exchange_bytes(ranks, numbers_max)
        if os.fstat(fd).st_size != size:
            raise ValueError(f"the memory has {os.fstat(fd).st_size} bytes, {ranks} ranks need {size}")
        self.memory = mmap.mmap(fd, size)
        self.view = self.memory
        self.handle = kf_exchange_attach(&self.view[0], ranks, rank, numbers_max)
        if self.handle is NULL:
            raise ValueError(f"the memory belongs to an exchange of another size than {ranks} x {numbers_max}")
        self.ranks, self.rank, self.numbers_max = ranks, rank, numbers_max

    def __dealloc__(self):
        kf_exchange_detach(self.handle)

    def place(self, int64_t numbers):
        if not 0 < numbers <= self.numbers_max:
            raise ValueError(f"{numbers} numbers: 1 to {self.numbers_max} can be reduced")
        return np.asarray(<int64_t[:numbers]>kf_exchange_place(self.handle))

    def reduce(self, int64_t numbers, int64_t timeout_ns):
        """Returns (outcome, sums or None, rank that was missing or -1)."""
        if not 0 < numbers <= self.numbers_max:
            raise ValueError(f"{numbers} numbers: 1 to {self.numbers_max} can be reduced")
        cdef const int64_t *total
        cdef int outcome
        with nogil:
            outcome = kf_exchange_reduce(self.handle, numbers, timeout_ns, &total)
        if outcome != KF_REDUCED:
            return outcome, None, kf_exchange_missing(self.handle)
        return outcome, np.asarray(<int64_t[:numbers]>(<int64_t *>total)), -1

    def abort(self):
        kf_exchange_abort(self.handle)

    @property
    def address(self):
        """Of the handle, for kernels that reduce within a step."""
        return <size_t>self.handle

    @property
    def missing(self):
        """The rank that was not there when the last call was late, or -1."""
        return kf_exchange_missing(self.handle)

    @property
    def aborted(self):
        return kf_exchange_aborted(self.handle) != 0
