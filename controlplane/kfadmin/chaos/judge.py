"""Whether streams suffered, and through which fault (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from controlplane.kfadmin.chaos.gameday import Course
from controlplane.kfadmin.loadgen import Stream


def parts_at(got: Sequence[int], wanted: Sequence[int], begin: int = 0) -> int | None:
    """Where a stream ceases to be the beginning of its reference, from `begin` on; None: nowhere yet."""
    for index in range(begin, len(got)):
        if index >= len(wanted) or got[index] != wanted[index]:
            return index
    return None


def silence_s(stream: Stream, now: float) -> float:
    """For how long a running stream has been without a token; of a new one, since it was sent."""
    last = stream.times[-1] if stream.times else stream.sent
    return now - last if last and not stream.done else 0.0


def waits(stream: Stream, now: float) -> Iterator[tuple[float, float]]:
    """When each wait for a token began and ended, the first token's from when it was sent; of one that runs, the last
    one goes on."""
    moments = [stream.sent, *stream.times] if stream.sent else []
    if moments and not stream.done:
        moments.append(now)
    yield from pairwise(moments)


@dataclass(slots=True)
class Pauses:
    """What streams waited through, by fault. Seconds; keys are faults' numbers, 0 is while there was none."""

    # The longest of each stream that it touched.
    by_fault: dict[int, list[float]] = field(default_factory=dict)

    def take(self, stream: Stream, courses: Iterable[Course], now: float) -> float:
        """Of a stream that has ended, `now`. Its longest wait, through faults or not.

        A wait counts for every fault that was open during it, from when the fault began: tokens before it are not its
        doing."""
        windows = [(c.number, c.began, c.home or now) for c in courses if c.began]
        longest: dict[int, float] = {}
        whole = 0.0
        for began, ended in waits(stream, now):
            whole = max(whole, ended - began)
            calm = True
            for number, first, last in windows:
                if began < last and ended > first:
                    calm = False
                    longest[number] = max(longest.get(number, 0.0), ended - max(began, first))
            if calm:
                longest[0] = max(longest.get(0, 0.0), ended - began)
        for number, wait_s in longest.items():
            self.by_fault.setdefault(number, []).append(wait_s)
        return whole

    def worst(self, number: int) -> float | None:
        return max(self.by_fault.get(number, ()), default=None)

    def median(self, number: int) -> float | None:
        found = sorted(self.by_fault.get(number, ()))
        return found[len(found) // 2] if found else None

    def streams(self, number: int) -> int:
        return len(self.by_fault.get(number, ()))
