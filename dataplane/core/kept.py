"""Logs of requests that run no more, for clients that come back: bounded in time, number and size (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.core.request import Request

COST_MAX = 1 << 20  # tokens, a logprob counting as one; about 140 bytes each


@dataclass(frozen=True, slots=True)
class _Entry:
    request: Request
    until: float
    cost: int


class Kept:
    """Finished requests, and those whose client hung up. Over a bound, the oldest go first."""

    def __init__(self, grace_s: float, requests_max: int, cost_max: int = COST_MAX) -> None:
        self._grace_s = grace_s
        self._requests_max = requests_max
        self._cost_max = cost_max
        self._cost = 0
        self._entries: dict[int, _Entry] = {}  # in order of their deadlines

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, request: Request, now: float) -> None:
        self.pop(request.rid)
        logprobs = request.sampling.logprobs
        per_token = 1 if logprobs is None else 1 + logprobs
        text = len(request.context or b"") + len(request.sampling.grammar) + len(request.scores)
        cost = request.prompt_len + len(request.output) * per_token + text // 128
        self._entries[request.rid] = _Entry(request, now + self._grace_s, cost)
        self._cost += cost
        while self._cost > self._cost_max or len(self._entries) > self._requests_max:
            self.pop(next(iter(self._entries)))

    def get(self, rid: int) -> Request | None:
        entry = self._entries.get(rid)
        return None if entry is None else entry.request

    def pop(self, rid: int) -> None:
        entry = self._entries.pop(rid, None)
        if entry is not None:
            self._cost -= entry.cost

    def expire(self, now: float) -> None:
        while self._entries and (rid := next(iter(self._entries))) and self._entries[rid].until < now:
            self.pop(rid)
