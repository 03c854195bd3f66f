"""The bytes that clients' requests keep in this process: bounded in sum, and for each client (pure).

A request counts from the first byte of its body until its answer is over: first as what has been read, then as what is
kept to go on with it, and beside that as what is there of its answer and cannot leave yet: since its client does not
read, or since the answer is one piece.
"""

from __future__ import annotations

from collections import Counter

from web.gateway.errors import ApiError
from web.gateway.key_usage import KeyUsage

TOTAL_MAX = 2 << 30
SHARE = 0.5
RETRY_S = 1.0


class Memory:
    """Who holds how much. A client is known by the hash of its API key."""

    def __init__(self, total_max: int = TOTAL_MAX, share: float = SHARE) -> None:
        self.total_max = total_max
        self.client_max = max(1, int(total_max * share))
        self.total = 0
        self.refused = 0
        self._of: Counter[bytes] = Counter()

    def of(self, owner: bytes) -> int:
        return self._of[owner]

    def hold(self, owner: bytes, most: int = 0, usage: KeyUsage | None = None) -> Hold:
        """`most`: bytes that this client may have, if that is less than others may. `usage`: of the key that it
        comes with."""
        return Hold(self, owner, min(most or self.client_max, self.client_max), usage)

    def take(self, owner: bytes, size: int, has: int = 0, most: int = 0) -> None:
        """`has`: what the same request has already. `most`: see `hold`. Raises ApiError: 413 if that is too much even
        alone, 429 while the client has too much, 503 while all have."""
        most = most or self.client_max
        if has + size > most:
            self.refused += 1
            raise ApiError(413, f"this request would keep {has + size} bytes, and a client may keep {most}")
        if self._of[owner] + size > most:
            self.refused += 1
            text = f"the requests of this API key keep {self._of[owner]} of {most} bytes: try again later"
            raise ApiError(429, text, retry_after_s=RETRY_S)
        if self.total + size > self.total_max:
            self.refused += 1
            raise ApiError(
                503, "this gateway's memory for requests is full: try again later", retry_after_s=RETRY_S
            )
        self._of[owner] += size
        self.total += size

    def give(self, owner: bytes, size: int) -> None:
        self.total -= size
        self._of[owner] -= size
        if not self._of[owner]:
            del self._of[owner]


class Hold:
    """What one request holds, and its place among its key's requests. Given back by `release`, at the latest with the
    object itself."""

    __slots__ = ("_memory", "_most", "_owner", "_usage", "size")

    def __init__(self, memory: Memory, owner: bytes, most: int, usage: KeyUsage | None) -> None:
        self._memory = memory
        self._owner = owner
        self._most = most
        self._usage = usage
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold `size` bytes more. Raises ApiError, and then holds what it held."""
        self._memory.take(self._owner, size, self.size, self._most)
        self.size += size

    def become(self, size: int) -> None:
        """Hold `size` bytes in place of what it held. Raises ApiError, and then holds what it held."""
        if size > self.size:
            self.grow(size - self.size)
        else:
            self._memory.give(self._owner, self.size - size)
            self.size = size

    def shrink(self, size: int) -> None:
        """Give `size` bytes back, or all there are."""
        self.become(max(0, self.size - size))

    @property
    def key(self) -> str:
        """Name of the API key, or ""."""
        return self._usage.name if self._usage is not None else ""

    def charge(self, prompt_tokens: int, generation_tokens: int) -> None:
        """The key has used so much more."""
        if self._usage is not None:
            self._usage.charge(prompt_tokens, generation_tokens)

    def release(self) -> None:
        self._memory.give(self._owner, self.size)
        self.size = 0
        usage, self._usage = self._usage, None
        if usage is not None:
            usage.end()

    def __del__(self) -> None:
        self.release()
