"""Numeric socket addresses for C interfaces."""

from libc.stdint cimport uint16_t
from libc.string cimport memset


cdef extern from "sys/socket.h" nogil:
    cdef struct sockaddr:
        pass
    ctypedef unsigned int socklen_t
    cdef struct sockaddr_storage:
        unsigned short ss_family
    int AF_INET
    int AF_INET6


cdef extern from "netinet/in.h" nogil:
    cdef struct in_addr:
        pass
    cdef struct in6_addr:
        pass
    cdef struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    cdef struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
    uint16_t htons(uint16_t value)
    uint16_t ntohs(uint16_t value)


cdef extern from "arpa/inet.h" nogil:
    int inet_pton(int family, const char *text, void *address)


cdef inline socklen_t fill_sockaddr(str host, int port, sockaddr_storage *out) except 0:
    """Fills `out` from a numeric address. Raises ValueError for anything else."""
    cdef sockaddr_in *v4 = <sockaddr_in *>out
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *>out
    if not 0 <= port <= 65535:
        raise ValueError(f"port out of range: {port}")
    memset(out, 0, sizeof(sockaddr_storage))
    name = host.encode()
    if inet_pton(AF_INET, name, &v4.sin_addr) == 1:
        v4.sin_family = <unsigned short>AF_INET
        v4.sin_port = htons(<uint16_t>port)
        return sizeof(sockaddr_in)
    if inet_pton(AF_INET6, name, &v6.sin6_addr) == 1:
        v6.sin6_family = <unsigned short>AF_INET6
        v6.sin6_port = htons(<uint16_t>port)
        return sizeof(sockaddr_in6)
    raise ValueError(f"not a numeric address: {host!r}")
