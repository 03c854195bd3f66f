# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What a stage of the executor `oracle` computes, in one pass over the KV blocks (see dataplane/oracle.py)."""

from libc.stdint cimport int32_t, int64_t, uint64_t

import numpy as np

cdef uint64_t ODD = 0x9E3779B97F4A7C15ULL


cdef inline uint64_t mixed(uint64_t value) noexcept nogil:
    value = (value ^ (value >> 30)) * <uint64_t>0xBF58476D1CE4E5B9ULL
    value = (value ^ (value >> 27)) * <uint64_t>0x94D049BB133111EBULL
    return value ^ (value >> 31)


def stage_hashes(const uint64_t[::1] hashes, uint64_t[:, ::1] blocks, step, Py_ssize_t stage,
                 const uint64_t[::1] weights):
    """Writes the KV of all tokens of a step and returns their hashes after the stage, uint64 [T].

    `hashes` [T] come from the stage before, `blocks` is [blocks, block_size], `weights` has one for each position.
    Raises ValueError for arrays that do not fit each other, IndexError for a block that does not exist; nothing is
    written then."""
    cdef const int64_t[::1] slots = step.slots
    cdef const int32_t[::1] cu_q = step.cu_q, contexts = step.context_lens
    cdef const int32_t[:, ::1] tables = step.tables
    cdef Py_ssize_t tokens = slots.shape[0], rows = contexts.shape[0], size = blocks.shape[1]
    cdef Py_ssize_t capacity = blocks.shape[0] * size, row, index, t, position, known, begin, end
    cdef uint64_t salt = <uint64_t>(stage + 1) * ODD, seen
    cdef const uint64_t *block
    if hashes.shape[0] != tokens or cu_q.shape[0] != rows + 1 or cu_q[rows] != tokens:
        raise ValueError(f"{hashes.shape[0]} hashes for {tokens} tokens in {rows} rows")
    for t in range(tokens):
        if not 0 <= slots[t] < capacity:
            raise IndexError(f"there is no KV slot {slots[t]}, only {capacity}")
    for row in range(rows):
        end = contexts[row]
        if not cu_q[row + 1] - cu_q[row] <= end <= min(weights.shape[0], tables.shape[1] * size):
            raise ValueError(f"a context of {end} positions")
        for index in range((end + size - 1) // size):
            if not 0 <= tables[row, index] < blocks.shape[0]:
                raise IndexError(f"there is no KV block {tables[row, index]}, only {blocks.shape[0]}")
    result = np.empty(tokens, np.uint64)
    cdef uint64_t[::1] out = result
    cdef uint64_t *flat = &blocks[0, 0]
    with nogil:
        for t in range(tokens):
            flat[slots[t]] = mixed(hashes[t] + salt)
        for row in range(rows):
            seen = 0
            end = contexts[row]
            known = end - (cu_q[row + 1] - cu_q[row])  # positions of earlier steps
            t = cu_q[row]
            for index in range((end + size - 1) // size):
                block = &blocks[tables[row, index], 0]
                begin = index * size
                for position in range(begin, min(known, begin + size)):
                    seen += block[position - begin] * weights[position]
                for position in range(max(known, begin), min(end, begin + size)):
                    seen += block[position - begin] * weights[position]
                    out[t] = mixed(hashes[t] ^ seen * ODD)
                    t += 1
    return result
