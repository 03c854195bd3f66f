"""The records on a stream, the system calls behind it, and the state of its sending side."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "sys/socket.h" nogil:
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    unsigned char *CMSG_DATA(cmsghdr *part)
    size_t CMSG_LEN(size_t length)
    size_t CMSG_SPACE(size_t length)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int SOL_SOCKET
    int SCM_RIGHTS
    int MSG_NOSIGNAL
    int MSG_DONTWAIT
    int MSG_CMSG_CLOEXEC


cdef extern from "sys/mman.h" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int memfd_create(const char *name, unsigned flags)
    void *MAP_FAILED
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    unsigned MFD_CLOEXEC
    unsigned MFD_ALLOW_SEALING


cdef extern from "sys/stat.h" nogil:
    cdef struct struct_stat "stat":
        long st_size
    int fstat(int fd, struct_stat *out)


cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, ...)
    int posix_fallocate(int fd, long offset, long length)
    int F_ADD_SEALS
    int F_GET_SEALS
    int F_SEAL_SHRINK
    int F_SEAL_GROW
    int F_SEAL_SEAL


cdef extern from "unistd.h" nogil:
    int close_fd "close"(int fd)


cdef enum:
    MAGIC = 0x464B
    MESSAGE = 1
    RINGED = 2
    CHUNK = 3
    CREDIT = 4
    RING = 5

cdef enum:
    HEADER_MAX = 64
    HEAD_MAX = 80               # a record and its header
    CONTROL_MAX = 256
    # Below, a copy through the socket is as cheap as a record and a credit.
    RINGED_MIN = 32 << 10
    RING_BYTES = 1 << 20
    # The receiver copies one chunk out while the sender copies the next one in.
    CHUNK_BYTES = 256 << 10
    # Less is not given back at once: a credit wakes the peer, which has something better to do. What is kept back
    # must leave room for a chunk, or the peer would wait for it for ever.
    CREDIT_MIN = 256 << 10


cdef struct Record:
    # What every record on the stream begins with, little endian.
    uint16_t magic
    uint8_t kind
    uint8_t header_length
    uint32_t reserved
    uint64_t length


cdef inline void put_record(char *at, uint8_t kind, size_t header_length, size_t length) noexcept nogil:
    cdef Record record
    record.magic, record.kind, record.reserved = MAGIC, kind, 0
    record.header_length, record.length = <uint8_t>header_length, length
    memcpy(at, &record, sizeof(Record))


cdef struct Outgoing:
    # One message that waits for room; its views follow it in the same memory.
    Outgoing *next
    Py_buffer *views
    Py_ssize_t views_len
    Py_ssize_t view             # where the rest of the payload begins
    size_t in_view
    size_t length
    size_t sent                 # payload handed over
    size_t head_length
    size_t head_sent
    bint by_ring
    char head[HEAD_MAX]


cdef class Outbox:
    cdef int fd                 # the stream's
    cdef bint local
    cdef long long queued_bytes
    cdef size_t credit_due      # bytes taken out of the peer's ring and not yet given back
    # Messages, oldest first, and records that go before them.
    cdef Outgoing *_first
    cdef Outgoing *_last
    cdef char _control[CONTROL_MAX]
    cdef size_t _control_length, _control_sent
    cdef char *_ring
    cdef size_t _ring_at, _ring_free
    cdef int _ring_fd           # until the peer has it

    cdef bint push(self, bytes header, parts) except -1
    cdef bint credited(self, size_t length) noexcept
    cdef int flush(self) noexcept
    cdef void drop(self) noexcept
    cdef ssize_t _write(self) noexcept
    cdef ssize_t _write_control(self) noexcept
    cdef void _append(self, uint8_t kind, size_t length) noexcept
    cdef bint _make_ring(self) noexcept
    cdef void _fill_ring(self, Outgoing *out) noexcept
    cdef void _pop(self) noexcept
