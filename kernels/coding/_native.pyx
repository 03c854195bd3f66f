# cython: boundscheck=False, wraparound=False, cdivision=True
"""Thin binding of coding.h; codes.py has the algebra. The interpreter is left to others while bytes are worked on."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy


cdef extern from "coding.h" nogil:
    int KF_DATA_MAX, KF_PARITY_MAX, KF_RDP_ROWS
    ctypedef struct kf_shard:
        uint8_t *bytes
        int64_t size
    ctypedef struct kf_code:
        int data, parity
        uint8_t rows[8][256]
    ctypedef struct kf_repair:
        int count
        int lost[8]
        int rows[8]
        uint8_t inverse[8][8]
    ctypedef struct kf_product:
        uint64_t affine
    kf_product kf_products[256]
    void kf_coding_init()
    int kf_coding_set_level(int level)
    void kf_rs_encode(const kf_code *code, const kf_shard *data, const kf_shard *parity, int64_t begin, int64_t end,
                      int stream)
    void kf_rs_update(const kf_code *code, int index, kf_shard shard, const kf_shard *parity, int64_t begin,
                      int64_t end)
    void kf_rs_restore(const kf_code *code, const kf_repair *repair, const kf_shard *data, const kf_shard *parity,
                       int64_t begin, int64_t end, int stream)
    void kf_rdp_encode(int n, const kf_shard *data, const kf_shard *parity, int64_t width, int64_t begin, int64_t end,
                       int stream)
    void kf_rdp_update(int index, kf_shard shard, const kf_shard *parity, int64_t width, int64_t begin, int64_t end)
    void kf_rdp_restore(int n, int x, int y, const kf_shard *data, const kf_shard *parity, int64_t width,
                        int64_t begin, int64_t end, int stream)

DATA_MAX, PARITY_MAX, RDP_ROWS = KF_DATA_MAX, KF_PARITY_MAX, KF_RDP_ROWS
kf_coding_init()


def set_level(int level):
    """Limits the instruction set: 0 C, 1 AVX2, 2 AVX-512, 3 with GFNI, -1 the best. Returns what is in use."""
    return kf_coding_set_level(level)


def bit_matrix(uint8_t factor):
    """For tests: what the product with `factor` is for a processor that multiplies with matrices of bits."""
    return kf_products[factor].affine


cdef class Shards:
    """Buffers of any type of element as bytes, held for a call; None is a shard that is not there, or not wanted.

    Raises BufferError if one is not contiguous, or is to be written and cannot be."""

    cdef Py_buffer *views
    cdef kf_shard *shards
    cdef readonly Py_ssize_t count
    cdef readonly int64_t longest, shortest  # of those that are there; -1: none is

    def __cinit__(self, buffers, writable=()):
        self.views = <Py_buffer *>calloc(len(buffers) + 1, sizeof(Py_buffer))
        self.shards = <kf_shard *>calloc(len(buffers) + 1, sizeof(kf_shard))
        if self.views == NULL or self.shards == NULL:
            raise MemoryError("no memory for the addresses of shards")
        self.longest = self.shortest = -1
        for i, buffer in enumerate(buffers):
            self.count = i + 1
            if buffer is None:
                continue
            PyObject_GetBuffer(buffer, &self.views[i], PyBUF_WRITABLE if i in writable else PyBUF_SIMPLE)
            self.shards[i].bytes = <uint8_t *>self.views[i].buf
            self.shards[i].size = self.views[i].len
            self.longest = max(self.longest, self.views[i].len)
            self.shortest = self.views[i].len if self.shortest < 0 else min(self.shortest, self.views[i].len)

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.count):
            PyBuffer_Release(&self.views[i])
        free(self.views)
        free(self.shards)


cdef class Code:
    """XOR or Reed-Solomon: parity i is the sum of rows[i][j] times shard j. Row 0 is ones, row 1 powers of two."""

    cdef kf_code c

    def __cinit__(self, rows):
        cdef const uint8_t[::1] row
        self.c.parity = len(rows)
        self.c.data = len(rows[0])
        if self.c.parity > KF_PARITY_MAX or self.c.data > KF_DATA_MAX:
            raise ValueError(f"at most {KF_DATA_MAX} data and {KF_PARITY_MAX} parity shards")
        for i in range(self.c.parity):
            row = rows[i]
            memcpy(self.c.rows[i], &row[0], self.c.data)

    cdef int check(self, Shards data, Shards parity) except -1:
        if data.count != self.c.data or parity.count != self.c.parity:
            raise ValueError(f"{self.c.data} data and {self.c.parity} parity shards, "
                             f"not {data.count} and {parity.count}")
        return 0

    def encode(self, Shards data, Shards parity, int64_t begin, int64_t end, int stream=-1):
        """stream: 1, parities go past the cache; 0, they do not; -1, if they are long."""
        self.check(data, parity)
        with nogil:
            kf_rs_encode(&self.c, data.shards, parity.shards, begin, end, stream)

    def update(self, int index, Shards shard, Shards parity, int64_t begin, int64_t end):
        with nogil:
            kf_rs_update(&self.c, index, shard.shards[0], parity.shards, begin, end)

    def restore(self, lost, rows, inverse, Shards data, Shards parity, int64_t begin, int64_t end, int stream=-1):
        """The data shards `lost` from the parities `rows`; inverse: of the part of the generator that they share."""
        cdef kf_repair repair
        cdef const uint8_t[::1] row
        self.check(data, parity)
        repair.count = len(lost)
        for i in range(repair.count):
            repair.lost[i], repair.rows[i] = lost[i], rows[i]
            row = inverse[i]
            memcpy(repair.inverse[i], &row[0], repair.count)
        with nogil:
            kf_rs_restore(&self.c, &repair, data.shards, parity.shards, begin, end, stream)


def rdp_encode(Shards data, Shards parity, int64_t width, int64_t begin, int64_t end, int stream=-1):
    with nogil:
        kf_rdp_encode(<int>data.count, data.shards, parity.shards, width, begin, end, stream)


def rdp_update(int index, Shards shard, Shards parity, int64_t width, int64_t begin, int64_t end):
    with nogil:
        kf_rdp_update(index, shard.shards[0], parity.shards, width, begin, end)


def rdp_restore(int x, int y, Shards data, Shards parity, int64_t width, int64_t begin, int64_t end, int stream=-1):
    """Two lost columns x < y of the array; y = RDP_ROWS is the row parity."""
    with nogil:
        kf_rdp_restore(<int>data.count, x, y, data.shards, parity.shards, width, begin, end, stream)
