# cython: boundscheck=False, wraparound=False
"""A mutex in shared memory that its owner never gives back. The kernel does when the owner ends, whatever ends it, and
before it takes the memory of the process apart. Its sockets are closed only after that, 45 ms later for each GB in
small pages."""

from libc.errno cimport EINVAL, ETIMEDOUT, errno
from libc.stdint cimport uint32_t
from libc.string cimport strerror

cdef extern from "<errno.h>" nogil:
    int EOWNERDEAD, ENOTRECOVERABLE

cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(clockid_t clock, timespec *now)
    clockid_t CLOCK_MONOTONIC

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_mutexattr_t:
        pass
    int PTHREAD_PROCESS_SHARED
    int PTHREAD_MUTEX_ROBUST
    int pthread_mutexattr_init(pthread_mutexattr_t *attributes)
    int pthread_mutexattr_setpshared(pthread_mutexattr_t *attributes, int shared)
    int pthread_mutexattr_setrobust(pthread_mutexattr_t *attributes, int robust)
    int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const timespec *until)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void *MAP_FAILED

cdef enum:
    READY = 0x4B464C31  # "KFL1": the mutex behind it is made

ctypedef struct page_t:
    uint32_t ready
    pthread_mutex_t mutex

BYTES = sizeof(page_t)


cdef page_t *_map(int fd) except NULL:
    cdef void *found = mmap(NULL, sizeof(page_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if found == MAP_FAILED:
        raise OSError(errno, strerror(errno).decode())
    return <page_t *> found


def hold(int fd):
    """From now on, and for as long as the calling thread lives, the mutex in the file (of BYTES or more) is its own.
    Raises OSError."""
    cdef pthread_mutexattr_t attributes
    cdef page_t *page = _map(fd)  # for ever
    pthread_mutexattr_init(&attributes)
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED)
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST)
    cdef int failed = pthread_mutex_init(&page.mutex, &attributes) or pthread_mutex_lock(&page.mutex)
    if failed:
        munmap(page, sizeof(page_t))
        raise OSError(failed, strerror(failed).decode())
    page.ready = READY


def ended(int fd, double limit_s):
    """Whether the owner of the mutex in the file has ended; waits for it for so many seconds, and lets other threads
    run meanwhile. Raises OSError, also for a file without a mutex that somebody holds."""
    cdef page_t *page = _map(fd)
    cdef timespec until
    cdef int got = EINVAL
    if page.ready == READY:
        with nogil:
            clock_gettime(CLOCK_MONOTONIC, &until)
            until.tv_nsec += <long> (limit_s * 1e9)
            until.tv_sec += until.tv_nsec // 1000000000
            until.tv_nsec %= 1000000000
            got = pthread_mutex_clocklock(&page.mutex, CLOCK_MONOTONIC, &until)
            if got == EOWNERDEAD or got == 0:
                # It is not made good again: whoever asks after us hears the same.
                pthread_mutex_unlock(&page.mutex)
    munmap(page, sizeof(page_t))
    if got == ETIMEDOUT:
        return False
    if got == EOWNERDEAD or got == ENOTRECOVERABLE:
        return True
    raise OSError(got or EINVAL, "nobody holds it")
