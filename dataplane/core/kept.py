"""Logs of requests that run no more, for clients that come back: bounded in time, number and size (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.core.request import Request

BYTES_MAX = 144 << 20


@dataclass(frozen=True, slots=True)
class _Entry:
    request: Request
    until: float
    size: int  # bytes


class Kept:
    """Finished requests, and those whose client hung up. Over a bound, the oldest go first."""

    def __init__(self, grace_s: float, requests_max: int, bytes_max: int = BYTES_MAX) -> None:
        self._grace_s = grace_s
        self._requests_max = requests_max
        self._bytes_max = bytes_max
        self.bytes_kept = 0
        self._entries: dict[int, _Entry] = {}  # in order of their deadlines

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, request: Request, now: float) -> None:
        self.pop(request.rid)
        size = request.log_bytes
        self._entries[request.rid] = _Entry(request, now + self._grace_s, size)
        self.bytes_kept += size
        while self.bytes_kept > self._bytes_max or len(self._entries) > self._requests_max:
            self.pop(next(iter(self._entries)))

    def get(self, rid: int) -> Request | None:
        entry = self._entries.get(rid)
        return None if entry is None else entry.request

    def pop(self, rid: int) -> None:
        entry = self._entries.pop(rid, None)
        if entry is not None:
            self.bytes_kept -= entry.size

    def expire(self, now: float) -> None:
        while self._entries and (rid := next(iter(self._entries))) and self._entries[rid].until < now:
            self.pop(rid)
