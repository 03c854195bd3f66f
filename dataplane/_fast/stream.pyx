# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Messages on one connected socket of an asyncio loop, TCP or local, without Python work for each piece.

The loop calls `readable` and `writable`; `send` writes at once what the socket takes. System calls here never
block and keep the interpreter lock: giving it up for a few microseconds can cost milliseconds to get back
while a compute thread runs.

The sending side, and how large messages between processes of one host travel: outbox.pyx.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset, strerror
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .outbox cimport (
    CHUNK, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CREDIT, CREDIT_MIN, F_GET_SEALS, F_SEAL_SHRINK, HEADER_MAX, MAGIC,
    MAP_FAILED, MAP_SHARED, MESSAGE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, PROT_READ, RING, RING_BYTES, RINGED,
    RINGED_MIN, SCM_RIGHTS, SOL_SOCKET, Outbox, Record, close_fd, cmsghdr, fcntl, fstat, iovec, mmap, msghdr,
    munmap, recvmsg, struct_stat)


cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    # Small messages arrive here whole; of large ones only the beginning is copied twice.
    SCRATCH_BYTES = 16 << 10

cdef double RECEIVE_BUDGET_S = 0.002  # then the loop gets its turn


cdef double _now() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return ts.tv_sec + ts.tv_nsec * 1e-9


cdef class Stream:
    """One socket. Takes over the non-blocking descriptor `fd`, which may still be connecting; `local` says that
    it is a Unix socket. `open` turns False once, at `close` or failure; `queued_bytes` are the bytes given to
    `send` that the socket has not taken; a message over `limit_bytes` fails the stream; `user` is the caller's.

    `owner` has `on_message(stream, header: bytes, data: memoryview)`, called from `readable` only; and, called
    from anywhere, so that they must do nothing at once but note it: `failed(stream, reason)`,
    `watch_writable(stream, wanted)`, `again(stream)` (call `readable` soon), `released(stream)` (before its
    descriptor closes).
    """

    def __cinit__(self, int fd, owner, bint local):
        self.fd = fd
        self.open = True
        self._owner = owner
        self._outbox = Outbox.__new__(Outbox)
        self._outbox.fd, self._outbox.local = fd, local
        self._local = local
        self._passed_fd = -1
        self._scratch = <char *>malloc(SCRATCH_BYTES)
        if self._scratch == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.fd >= 0:
            close_fd(self.fd)
        self._let_go()
        free(self._scratch)

    cdef void _let_go(self) noexcept:
        if self._passed_fd >= 0:
            close_fd(self._passed_fd)
            self._passed_fd = -1
        if self._ring != NULL:
            munmap(self._ring, RING_BYTES)
            self._ring = NULL

    def close(self):
        """Drops the connection and what is queued on it, now. Idempotent; no event follows."""
        self.open = False
        if self.fd >= 0:
            self._owner.released(self)
            close_fd(self.fd)
            self.fd = -1
            self._let_go()
            self._outbox.drop()

    cdef int _fail(self, str reason) except -1:
        if self.open:
            self.open = False
            self._owner.failed(self, reason)
        return 0

    cdef int _fail_errno(self, int number) except -1:
        return self._fail(strerror(number).decode(errors="replace"))

    # Receiving.

    def readable(self):
        """Takes in what has arrived, for about 2 ms at most, and delivers what is complete."""
        try:
            self._receive()
        except BaseException:
            self._owner.again(self)  # what came with the message must not wait for another one
            raise

    cdef int _receive(self) except -1:
        cdef double deadline = 0
        cdef ssize_t count
        cdef size_t wanted = 0
        while True:
            self._parse()
            if self._outbox.credit_due >= CREDIT_MIN:
                self._flush()
            if not self.open:
                return 0
            if deadline == 0:
                deadline = _now() + RECEIVE_BUDGET_S
            elif _now() > deadline:
                return 0
            count = self._read(&wanted)
            if count < 0:
                if errno not in (EAGAIN, EINTR):
                    self._fail_errno(errno)
                return 0
            if count == 0:
                return self._fail("closed by the peer")
            if <size_t>count < wanted:  # nothing is left: the loop would tell us
                deadline = 1

    cdef ssize_t _read(self, size_t *wanted) except -2:
        """Reads into the message that is arriving and, behind it, into the scratch memory."""
        cdef iovec pieces[2]
        cdef msghdr message
        cdef char control[64]
        cdef cmsghdr *part
        cdef size_t rest = 0
        cdef ssize_t count
        if self._begin > 0:
            memmove(self._scratch, self._scratch + self._begin, self._end - self._begin)
            self._end -= self._begin
            self._begin = 0
        if self._partial is not None and not self._by_ring:
            rest = <size_t>len(self._partial) - self._filled
            pieces[0].iov_base = PyByteArray_AS_STRING(self._partial) + self._filled
            pieces[0].iov_len = rest
        pieces[1].iov_base = self._scratch + self._end
        pieces[1].iov_len = SCRATCH_BYTES - self._end
        memset(&message, 0, sizeof(message))
        message.msg_iov = &pieces[0 if rest > 0 else 1]
        message.msg_iovlen = 2 if rest > 0 else 1
        if self._local:
            message.msg_control, message.msg_controllen = control, sizeof(control)
        wanted[0] = rest + SCRATCH_BYTES - self._end
        count = recvmsg(self.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        if count <= 0:
            return count
        if self._local:
            part = CMSG_FIRSTHDR(&message)
            if part != NULL and part.cmsg_level == SOL_SOCKET and part.cmsg_type == SCM_RIGHTS:
                self._take_descriptors(<int *>CMSG_DATA(part), (part.cmsg_len - CMSG_LEN(0)) // sizeof(int))
        if <size_t>count <= rest:
            self._filled += <size_t>count
        else:
            self._filled += rest
            self._end += <size_t>count - rest
        return count

    cdef void _take_descriptors(self, int *fds, size_t count) noexcept:
        """Keeps one, for the RING record that it came with."""
        cdef size_t i
        for i in range(count):
            if self._passed_fd < 0:
                self._passed_fd = fds[i]
            else:
                close_fd(fds[i])

    cdef int _parse(self) except -1:
        """Handles all records that are complete."""
        cdef Record record
        cdef size_t count
        while self.open:
            if self._partial is not None and not self._by_ring:
                count = min(self._end - self._begin, <size_t>len(self._partial) - self._filled)
                memcpy(PyByteArray_AS_STRING(self._partial) + self._filled, self._scratch + self._begin, count)
                self._begin += count
                self._filled += count
                if self._filled < <size_t>len(self._partial):
                    return 0
                self._deliver()
                continue
            if self._end - self._begin < sizeof(Record):
                return 0
            memcpy(&record, self._scratch + self._begin, sizeof(Record))
            if record.magic != MAGIC or record.reserved != 0 or record.header_length > HEADER_MAX:
                return self._fail("not a record")
            if self._end - self._begin < sizeof(Record) + record.header_length:
                return 0
            self._begin += sizeof(Record)
            if record.kind == MESSAGE or record.kind == RINGED:
                self._begin_message(&record)
            elif record.header_length != 0:
                return self._fail("not a record")
            elif record.kind == CHUNK:
                self._take_chunk(record.length)
            elif record.kind == RING:
                self._map_ring(record.length)
            elif record.kind == CREDIT and self._outbox.credited(record.length):
                self._flush()
            else:
                return self._fail("a record out of place")
        return 0

    cdef int _begin_message(self, Record *record) except -1:
        if self._partial is not None:
            return self._fail("a message began before the last one ended")
        if <long long>record.length > self.limit_bytes or record.length > <uint64_t>PY_SSIZE_T_MAX:
            return self._fail(f"a message of {record.length} bytes is over the limit of {self.limit_bytes}")
        self._header = PyBytes_FromStringAndSize(self._scratch + self._begin, record.header_length)
        self._begin += record.header_length
        self._partial = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>record.length)
        self._filled = 0
        self._by_ring = record.kind == RINGED
        return 0

    cdef int _deliver(self) except -1:
        data, self._partial = memoryview(self._partial), None
        self._owner.on_message(self, self._header, data)
        return 0

    cdef int _take_chunk(self, size_t length) except -1:
        if (self._partial is None or not self._by_ring or self._ring == NULL
                or length > <size_t>len(self._partial) - self._filled or length > RING_BYTES - self._ring_at):
            return self._fail("a chunk out of place")
        memcpy(PyByteArray_AS_STRING(self._partial) + self._filled, self._ring + self._ring_at, length)
        self._filled += length
        self._ring_at = (self._ring_at + length) % RING_BYTES
        self._outbox.credit_due += length
        if self._filled == <size_t>len(self._partial):
            self._deliver()
        return 0

    cdef int _map_ring(self, size_t length) except -1:
        """The peer's ring. It must not be able to shrink: reading behind its end would be fatal to us."""
        cdef struct_stat info
        cdef int seals = fcntl(self._passed_fd, F_GET_SEALS) if self._passed_fd >= 0 else -1
        cdef void *memory = MAP_FAILED
        # Where messages worth a ring are over the limit, as before the hello has ended, so is the ring.
        if (self._ring == NULL and self.limit_bytes >= RINGED_MIN and length == RING_BYTES
                and seals >= 0 and seals & F_SEAL_SHRINK
                and fstat(self._passed_fd, &info) == 0 and info.st_size == RING_BYTES):
            memory = mmap(NULL, RING_BYTES, PROT_READ, MAP_SHARED, self._passed_fd, 0)
        if self._passed_fd >= 0:
            close_fd(self._passed_fd)
            self._passed_fd = -1
        if memory == MAP_FAILED:
            return self._fail("not a ring")
        self._ring = <char *>memory
        return 0

    # Sending.

    @property
    def queued_bytes(self):
        return self._outbox.queued_bytes

    def send(self, bytes header, parts):
        """Sends the concatenation of `parts` (C-contiguous buffers, kept alive and not to be changed until
        sent) after `header` (at most 64 bytes). Never blocks. False: the stream is not open, or failed now.
        Raises BufferError, TypeError, ValueError, MemoryError; then nothing was sent."""
        if self.open and self._outbox.push(header, parts):
            self._flush()
        return self.open

    def writable(self):
        """The socket has room again."""
        self._flush()

    cdef int _flush(self) except -1:
        cdef int number = self._outbox.flush() if self.open else 0
        if number != 0 and number != EAGAIN:
            self._fail_errno(number)
        elif self.open and self._waits_for_room != (number == EAGAIN):
            self._waits_for_room = number == EAGAIN
            self._owner.watch_writable(self, self._waits_for_room)
        return 0
