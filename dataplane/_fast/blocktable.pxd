from libc.stdint cimport int32_t, int64_t


cdef class Rows:
    cdef readonly object rids, starts, counts, sample_rids, sample_rows, drafts, depths


cdef class StepArrays:
    cdef readonly object positions, slots, cu_q, context_lens, tables
    cdef readonly Py_ssize_t num_tokens, num_rows
    cdef object positions_full, slots_full, cu_q_full, context_lens_full, tables_full
    cdef int64_t[::1] positions_c, slots_c
    cdef int32_t[::1] cu_q_c, context_lens_c, tables_c

    cdef void allocate_tokens(self, Py_ssize_t n) except *
    cdef void allocate_rows(self, Py_ssize_t n) except *
    cdef void allocate_tables(self, Py_ssize_t n) except *
    cdef void reserve(self, Py_ssize_t tokens, Py_ssize_t rows, Py_ssize_t entries) except *
    cdef void publish(self, Py_ssize_t tokens, Py_ssize_t rows, Py_ssize_t width) except *


cdef class BlockTable:
    cdef readonly Py_ssize_t max_rows, max_blocks_per_row, block_size
    cdef int32_t[:, ::1] entries
    cdef int32_t[::1] lengths, valid_c, written_c  # see commit
    cdef list free
    cdef StepArrays own

    cdef Py_ssize_t row_length(self, Py_ssize_t row) except -1
    cdef Py_ssize_t blocks_of(self, int64_t tokens) noexcept nogil
    cdef int check_step(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts) except -1
    cdef void write(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts,
                    StepArrays out, Py_ssize_t width) noexcept nogil
