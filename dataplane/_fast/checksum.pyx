# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Checksums of KV blocks, and blocks copied and checked in one call, without the interpreter (see crc32.h).

All calls leave the interpreter to others while they work, so that they can run in a thread beside the event loop."""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcpy

import numpy as np

cdef extern from "crc32.h" nogil:
    void kf_crc32_init(int folding)
    uint32_t kf_crc32(uint32_t value, const uint8_t *data, size_t size)
    uint32_t kf_crc32_copy(uint8_t *to, const uint8_t *source, size_t size)

cdef Py_ssize_t SMALL = 4096  # bytes that take less time than to let go of the interpreter

kf_crc32_init(1)


def crc32(const uint8_t[::1] data, uint32_t value=0):
    """What zlib.crc32 says."""
    cdef Py_ssize_t size = data.shape[0]
    cdef const uint8_t *begin = &data[0] if size else NULL
    if size <= SMALL:
        return kf_crc32(value, begin, size)
    with nogil:
        value = kf_crc32(value, begin, size)
    return value


def use_tables(bint only):
    """For tests: whether to do without the processor's instructions, as on one that lacks them."""
    kf_crc32_init(0 if only else 1)


cdef int check(const uint8_t[:, ::1] pool, const int64_t[::1] blocks) except -1:
    cdef Py_ssize_t i
    for i in range(blocks.shape[0]):
        if not 0 <= blocks[i] < pool.shape[0]:
            raise IndexError(f"block {blocks[i]} is not one of {pool.shape[0]}")
    return 0


def block_sums(const uint8_t[:, ::1] pool, const int64_t[::1] blocks):
    """CRC-32 of each of the blocks, uint32 [B]. Raises IndexError."""
    cdef Py_ssize_t i, count = blocks.shape[0], size = pool.shape[1]
    sums = np.empty(count, np.uint32)
    cdef uint32_t[::1] out = sums
    check(pool, blocks)
    with nogil:
        for i in range(count):
            out[i] = kf_crc32(0, &pool[blocks[i], 0], size)
    return sums


def gather_blocks(const uint8_t[:, ::1] pool, const int64_t[::1] blocks, uint8_t[::1] out):
    """Copies the blocks into `out`, one behind the other. Returns the CRC-32 of each, uint32 [B]. Raises IndexError,
    ValueError unless `out` has the size of the blocks."""
    cdef Py_ssize_t i, count = blocks.shape[0], size = pool.shape[1]
    if out.shape[0] != count * size:
        raise ValueError(f"{count} blocks of {size} bytes do not fit into {out.shape[0]}")
    sums = np.empty(count, np.uint32)
    cdef uint32_t[::1] found = sums
    check(pool, blocks)
    with nogil:
        for i in range(count):
            found[i] = kf_crc32_copy(&out[i * size], &pool[blocks[i], 0], size)
    return sums


def scatter_blocks(uint8_t[:, ::1] pool, const int64_t[::1] blocks, const uint8_t[::1] data,
                   const int64_t[::1] places):
    """Block blocks[i] becomes the piece places[i] of `data`, which is pieces of a block's size. Raises IndexError."""
    cdef Py_ssize_t i, count = blocks.shape[0], size = pool.shape[1], pieces
    pieces = data.shape[0] // size
    check(pool, blocks)
    if places.shape[0] != count:
        raise ValueError(f"{count} blocks and {places.shape[0]} places")
    for i in range(count):
        if not 0 <= places[i] < pieces:
            raise IndexError(f"piece {places[i]} is not one of {pieces}")
    with nogil:
        for i in range(count):
            memcpy(&pool[blocks[i], 0], &data[places[i] * size], size)


def piece_sums(const uint8_t[::1] data, Py_ssize_t size):
    """CRC-32 of each whole piece of `size` bytes of `data`, uint32 [B]."""
    cdef Py_ssize_t i, count = data.shape[0] // size
    sums = np.empty(count, np.uint32)
    cdef uint32_t[::1] out = sums
    with nogil:
        for i in range(count):
            out[i] = kf_crc32(0, &data[i * size], size)
    return sums
