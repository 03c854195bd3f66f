"""The state of one socket."""

from .outbox cimport Outbox, Record


cdef class Stream:
    cdef readonly int fd
    cdef readonly bint open
    cdef public long long limit_bytes
    cdef public object user
    cdef object _owner
    cdef Outbox _outbox
    cdef bint _local
    cdef bint _waits_for_room
    # Receiving: bytes read and not yet understood, and the message that is arriving.
    cdef char *_scratch
    cdef size_t _begin, _end
    cdef bytearray _partial
    cdef bytes _header
    cdef size_t _filled
    cdef bint _by_ring
    cdef int _passed_fd
    cdef char *_ring
    cdef size_t _ring_at

    cdef void _let_go(self) noexcept
    cdef int _fail(self, str reason) except -1
    cdef int _fail_errno(self, int number) except -1
    cdef int _receive(self) except -1
    cdef ssize_t _read(self, size_t *wanted) except -2
    cdef void _take_descriptors(self, int *fds, size_t count) noexcept
    cdef int _parse(self) except -1
    cdef int _begin_message(self, Record *record) except -1
    cdef int _deliver(self) except -1
    cdef int _take_chunk(self, size_t length) except -1
    cdef int _map_ring(self, size_t length) except -1
    cdef int _flush(self) except -1
