"""Memory in huge pages where the system gives them: one entry of the TLB covers 2 MB instead of 4 kB.

Blocks of a KV cache lie far apart and weights are read once a step, so with small pages nearly every read begins with a
walk of the page table. Pages become resident when they are first touched, so nothing is taken before it is used."""

import errno
import mmap

import numpy as np
import numpy.typing as npt

HUGE_BYTES = 1 << 21
ALIGN_BYTES = 64  # a cache line, and a vector of the widest instruction set
CHUNK_BYTES = 64 << 20


def huge_zeros(size: int, shared: bool = False) -> npt.NDArray[np.uint8]:
    """`size` zero bytes that begin at a multiple of 2 MB; `shared`: with processes that are forked from now on, where
    few systems give huge pages. Raises MemoryError."""
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    try:
        mapped = mmap.mmap(-1, size + HUGE_BYTES, flags=kind | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"cannot map {size} bytes: {error}") from error
    # A kernel without huge pages says so; small ones do as well, only slower.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    data = np.frombuffer(mapped, np.uint8)
    skip = -data.ctypes.data % HUGE_BYTES
    return data[skip : skip + size]


class Arena:
    """Gives out aligned pieces of huge pages, for as long as somebody holds one of them."""

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def zeros(self, size: int) -> npt.NDArray[np.uint8]:
        """`size` zero bytes, aligned to ALIGN_BYTES."""
        start = -(-self._used // ALIGN_BYTES) * ALIGN_BYTES
        if start + size > len(self._chunk):
            self._chunk = huge_zeros(max(size, CHUNK_BYTES))
            start = 0
        self._used = start + size
        return self._chunk[start : start + size]
