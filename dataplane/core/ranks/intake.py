"""A rank that returns is taken in without a pause: KV is copied to where it will be while the stage serves, and the
layout changes between two steps when nearly all of it is there."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Copy:
    """Blocks `start` to `start + blocks` of a request's planes go to where the next layout has them."""

    request: int
    start: int
    blocks: int


@dataclass(slots=True)
class _Progress:
    full: int = 0
    sent: int = 0
    there: int = 0


@dataclass(slots=True)
class Intake:
    """One change of layout under way. `weights`: whether all ranks have the weights of the next layout. The change is
    due once no more than `tail_blocks_max` blocks are left, which are sent with it."""

    window_blocks: int
    tail_blocks_max: int
    weights: bool = False
    _requests: dict[int, _Progress] = field(default_factory=dict)

    def filled(self, request: int, blocks: int) -> None:
        """The first `blocks` blocks of a request are computed; a request that is not known is new."""
        at = self._requests.setdefault(request, _Progress())
        at.full = max(at.full, blocks)

    def end(self, request: int) -> None:
        self._requests.pop(request, None)

    def next(self) -> list[Copy]:
        """What to copy now; of one request after the other, as the window has room."""
        room = self.window_blocks - sum(at.sent - at.there for at in self._requests.values())
        copies = []
        for request, at in self._requests.items():
            blocks = min(room, at.full - at.sent)
            if blocks > 0:
                copies.append(Copy(request, at.sent, blocks))
                at.sent += blocks
                room -= blocks
        return copies

    def copied(self, copy: Copy) -> None:
        """It has arrived. Copies of a request arrive in the order in which they were sent."""
        if at := self._requests.get(copy.request):
            at.there = max(at.there, copy.start + copy.blocks)

    @property
    def behind(self) -> int:
        """Blocks that are computed and not yet where they will be."""
        return sum(at.full - at.there for at in self._requests.values())

    @property
    def due(self) -> bool:
        return self.weights and self.behind <= self.tail_blocks_max
