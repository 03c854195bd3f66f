# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The sending side of a stream (stream.pyx): messages that wait, and the ring that large ones go through.

Large messages between processes of one host go through a ring of shared memory, which costs a third of the CPU
time. The sender makes it (a sealed memfd) for its first large message and passes it over the socket. Every use of
it is announced by a record on the socket and every byte taken out is given back by a credit, so neither side
reads what the other may be writing, nothing has to be polled, and a peer that dies or stops is what it is on
any socket: an end of file, or silence. What is taken out is copied before anyone looks at it.

    record   MESSAGE    header, then the payload
             RINGED     header; the payload comes in chunks
             CHUNK      that many bytes of the payload are in the ring, behind the last ones
             CREDIT     that many bytes of the ring may be written again
             RING       carries the ring's descriptor
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EINTR, errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cdef enum:
    PIECES_MAX = 64


cdef void _release(Outgoing *out) noexcept:
    cdef Py_ssize_t i
    for i in range(out.views_len):
        PyBuffer_Release(&out.views[i])
    free(out)


cdef Outgoing *_outgoing(parts, bytes header) except NULL:
    """Pins the parts. Raises BufferError, TypeError, MemoryError."""
    cdef Py_ssize_t count = len(parts)
    cdef Outgoing *out = <Outgoing *>calloc(1, sizeof(Outgoing) + <size_t>count * sizeof(Py_buffer))
    if out == NULL:
        raise MemoryError
    out.views = <Py_buffer *>(<char *>out + sizeof(Outgoing))
    try:
        for part in parts[:count]:
            PyObject_GetBuffer(part, &out.views[out.views_len], PyBUF_SIMPLE)
            out.length += <size_t>out.views[out.views_len].len
            out.views_len += 1
    except BaseException:
        _release(out)
        raise
    out.head_length = sizeof(Record) + <size_t>PyBytes_GET_SIZE(header)
    memcpy(out.head + sizeof(Record), PyBytes_AS_STRING(header), <size_t>PyBytes_GET_SIZE(header))
    return out


cdef void _advance(Outgoing *out, size_t count) noexcept nogil:
    """The next `count` bytes of the payload are handed over; empty parts are passed by."""
    cdef size_t left
    out.sent += count
    while out.view < out.views_len:
        left = <size_t>out.views[out.view].len - out.in_view
        if count < left:
            out.in_view += count
            return
        count -= left
        out.view += 1
        out.in_view = 0


cdef class Outbox:
    """What one stream has still to send. It neither closes nor watches the socket: its stream does."""

    def __cinit__(self):
        self.fd = self._ring_fd = -1

    def __dealloc__(self):
        self.drop()

    cdef void drop(self) noexcept:
        """Forgets everything."""
        while self._first != NULL:
            self._pop()
        if self._ring_fd >= 0:
            close_fd(self._ring_fd)
            self._ring_fd = -1
        if self._ring != NULL:
            munmap(self._ring, RING_BYTES)
            self._ring = NULL

    cdef bint push(self, bytes header, parts) except -1:
        """Queues a message. True: it is the first, `flush` now. Raises what `Stream.send` does."""
        cdef Outgoing *out
        if PyBytes_GET_SIZE(header) > HEADER_MAX:
            raise ValueError("header too long")
        out = _outgoing(parts, header)
        out.by_ring = out.length >= RINGED_MIN and self.local
        put_record(out.head, RINGED if out.by_ring else MESSAGE, out.head_length - sizeof(Record), out.length)
        self.queued_bytes += <long long>out.length
        if self._first == NULL:
            self._first = self._last = out
            return True
        self._last.next = out
        self._last = out
        return False

    cdef void _pop(self) noexcept:
        cdef Outgoing *out = self._first
        self._first = out.next
        if out.next == NULL:
            self._last = NULL
        self.queued_bytes -= <long long>out.length
        _release(out)

    cdef bint credited(self, size_t length) noexcept:
        """The peer gives room in the ring back. False: more than was taken."""
        if self._ring == NULL or length > <size_t>RING_BYTES - self._ring_free:
            return False
        self._ring_free += length
        return True

    cdef int flush(self) noexcept:
        """Hands over what the socket and the ring take. 0: done, or waiting for a credit; EAGAIN: the socket has
        no room; else the error number of a socket that is broken."""
        cdef Outgoing *out
        while True:
            out = self._first
            if self._control_sent == self._control_length:
                self._control_sent = self._control_length = 0
                if self.credit_due >= CREDIT_MIN and (out == NULL or out.by_ring or out.head_sent == 0):
                    self._append(CREDIT, self.credit_due)
                    self.credit_due = 0
                elif out == NULL:
                    return 0
                elif out.by_ring:
                    self._fill_ring(out)
                    if self._control_length == 0 and out.by_ring:
                        return 0  # the ring is full
            if (self._write_control() if self._control_length > 0 else self._write()) < 0 and errno != EINTR:
                return errno

    cdef ssize_t _write_control(self) noexcept:
        """One system call for the pending records."""
        cdef iovec piece
        cdef char control[64]
        cdef msghdr message
        cdef ssize_t count
        memset(&message, 0, sizeof(message))
        piece.iov_base = self._control + self._control_sent
        piece.iov_len = self._control_length - self._control_sent
        message.msg_iov, message.msg_iovlen = &piece, 1
        if self._ring_fd >= 0:
            message.msg_control, message.msg_controllen = control, CMSG_SPACE(sizeof(int))
            _describe(&message, self._ring_fd)
        count = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if count > 0:
            self._control_sent += <size_t>count
            if self._ring_fd >= 0:
                close_fd(self._ring_fd)
                self._ring_fd = -1
        return count

    cdef ssize_t _write(self) noexcept:
        """One system call for the next piece of the first message."""
        cdef iovec pieces[PIECES_MAX]
        cdef msghdr message
        cdef Outgoing *out = self._first
        cdef Py_ssize_t view
        cdef size_t used = 0, skip, taken
        cdef ssize_t count
        memset(&message, 0, sizeof(message))
        message.msg_iov = pieces
        if out.head_sent < out.head_length:
            pieces[0].iov_base = out.head + out.head_sent
            pieces[0].iov_len = out.head_length - out.head_sent
            used = 1
        skip = out.in_view
        for view in range(out.view, min(out.views_len, out.view + PIECES_MAX - 1)):
            pieces[used].iov_base = <char *>out.views[view].buf + skip
            pieces[used].iov_len = <size_t>out.views[view].len - skip
            used += 1
            skip = 0
        message.msg_iovlen = used
        count = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if count >= 0:
            taken = min(<size_t>count, out.head_length - out.head_sent)
            out.head_sent += taken
            _advance(out, <size_t>count - taken)
            if out.head_sent == out.head_length and out.sent == out.length:
                self._pop()
        return count

    cdef void _append(self, uint8_t kind, size_t length) noexcept:
        put_record(self._control + self._control_length, kind, 0, length)
        self._control_length += sizeof(Record)

    cdef bint _make_ring(self) noexcept:
        cdef int fd = memfd_create(b"kevlarflow link", MFD_CLOEXEC | MFD_ALLOW_SEALING)
        cdef void *memory = MAP_FAILED
        # Allocated now: without memory for it this fails here, not with a signal at the first use.
        if fd >= 0 and posix_fallocate(fd, 0, RING_BYTES) == 0 and fcntl(
                fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0:
            memory = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if memory == MAP_FAILED:
            if fd >= 0:
                close_fd(fd)
            return False
        self._ring_fd = fd
        self._ring = <char *>memory
        self._ring_free = RING_BYTES
        self._append(RING, RING_BYTES)
        return True

    cdef void _fill_ring(self, Outgoing *out) noexcept:
        """Puts the next chunk into the ring, if it has room, and its record behind the pending ones."""
        cdef size_t length, piece
        if self._ring == NULL and not self._make_ring():
            self.local = out.by_ring = False  # no memory for it: the socket will do
            put_record(out.head, MESSAGE, out.head_length - sizeof(Record), out.length)
            return
        if out.head_sent == 0:
            memcpy(self._control + self._control_length, out.head, out.head_length)
            self._control_length += out.head_length
            out.head_sent = out.head_length
        length = min(out.length - out.sent, min(<size_t>CHUNK_BYTES, RING_BYTES - self._ring_at))
        if length > self._ring_free:
            return
        self._append(CHUNK, length)
        self._ring_free -= length
        while length > 0:
            piece = min(length, <size_t>out.views[out.view].len - out.in_view)
            memcpy(self._ring + self._ring_at, <char *>out.views[out.view].buf + out.in_view, piece)
            _advance(out, piece)
            self._ring_at = (self._ring_at + piece) % RING_BYTES
            length -= piece
        if out.sent == out.length:
            self._pop()


cdef void _describe(msghdr *message, int fd) noexcept:
    """Lets the message carry a descriptor."""
    cdef cmsghdr *part = CMSG_FIRSTHDR(message)
    part.cmsg_level = SOL_SOCKET
    part.cmsg_type = SCM_RIGHTS
    part.cmsg_len = CMSG_LEN(sizeof(int))
    memcpy(CMSG_DATA(part), &fd, sizeof(int))
