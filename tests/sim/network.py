"""The network: connections as TCP has them, between processes that may be cut off from each other in any direction.

What one connection carries arrives in order and once, or is lost together with the connection. While a direction is
cut, what is sent waits and arrives late if the cut heals before somebody gives up: as with retransmission. Between two
connections of the same pair there is no order. Duplicates and reorders within a connection are possible with
`tamper`, for a path that rewrites frames; links number theirs and must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.sim.world import Process, World

DELAY_S = (0.001, 0.012)
DIAL_LIMIT_S = 0.5


class End:
    """One end of a connection. `receive(item)` and `down(reason)` are set by whoever uses it."""

    __slots__ = ("_last", "down", "gone", "net", "other", "patience_s", "process", "receive", "stalled", "up")

    def __init__(self, net: Network, process: Process, patience_s: float) -> None:
        self.net = net
        self.process = process
        self.other: End = self
        self.receive: Callable[[Any], None] = _ignore
        self.down: Callable[[str], None] = _ignore
        self.up = True  # as far as this end knows
        self.gone = False  # closed by this end, or its process is dead
        self.stalled: list[Any] = []  # on their way to this end, behind a cut
        self.patience_s = patience_s
        self._last = 0.0
        process.ends[self] = None

    def send(self, item: Any) -> None:
        """Give an item to the network. Nothing tells whether it arrives."""
        if self.up and not self.gone:
            self.net.carry(self, self.other, item)

    def close(self) -> None:
        """End it from this side; no callback comes here. The other end is told behind what is on its way."""
        if self.up:
            self.up = False
            self.net.finish(self, "closed by the peer")

    def arrive_at(self, when: float) -> float:
        """The moment at which the next item arrives: not before the last one."""
        if when > self._last:
            self._last = when
        return self._last


def _ignore(_: Any) -> None:
    pass


class Network:
    def __init__(self, world: World) -> None:
        self.world = world
        self.delay_s = 0.0  # added to every delay while the network is slow
        self.tamper: dict[tuple[str, str], list[str]] = {}  # what befalls the next items from a to b
        self.tampered: dict[str, int] = {}
        self._cut: dict[tuple[str, str], int] = {}
        self._listening: dict[str, tuple[Process, Callable[[End], None]]] = {}
        self._next_port = 1000

    # Who can reach whom.

    @property
    def whole(self) -> bool:
        """Nothing is cut."""
        return not self._cut

    def blocked(self, a: str, b: str) -> bool:
        return (a, b) in self._cut

    def cut(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Nothing passes from a to b any more, until healed as often as cut."""
        for pair in pairs:
            self._cut[pair] = self._cut.get(pair, 0) + 1
            if self._cut[pair] == 1:
                for end in self._ends(*pair):
                    if end.patience_s < 1e6:  # whoever pings gives up some time
                        for side in (end, end.other):
                            self.world.post(side.patience_s, side.process, self._lose_patience, side)

    def heal(self, pairs: Iterable[tuple[str, str]]) -> None:
        for pair in pairs:
            self._cut[pair] -= 1
            if not self._cut[pair]:
                del self._cut[pair]
                for end in self._ends(*pair):
                    waiting, end.stalled = end.stalled, []
                    for item in waiting:
                        self.carry(end.other, end, item)

    def _ends(self, a: str, b: str) -> list[End]:
        """Receiving ends of what goes from a to b."""
        found = [p for p in self.world.processes if p.name == b and p.alive]
        return [end for p in found for end in list(p.ends) if end.other.process.name == a]

    def _lose_patience(self, end: End) -> None:
        a, b = end.process.name, end.other.process.name
        if end.up and (self.blocked(a, b) or self.blocked(b, a)):
            self._end(end, "no answer to pings")

    # Connections.

    def address(self) -> str:
        self._next_port += 1
        return f"127.0.0.1:{self._next_port}"

    def listen(self, address: str, process: Process, accept: Callable[[End], None]) -> None:
        self._listening[address] = (process, accept)

    def unlisten(self, address: str) -> None:
        self._listening.pop(address, None)

    def dial(self, process: Process, address: str, patience_s: float, opened: Callable[[], None]) -> End:
        """Begin to open a connection: `opened` is called, or the end's `down`."""
        end = End(self, process, patience_s)
        listener = self._listening.get(address)
        if listener is None or not listener[0].alive:
            self.world.post(self._delay(), process, self._end, end, "connection refused")
            return end
        target, accept = listener
        if self.blocked(process.name, target.name) or self.blocked(target.name, process.name):
            self.world.post(DIAL_LIMIT_S, process, self._end, end, "connection timed out")
            return end
        there = End(self, target, patience_s)
        end.other, there.other = there, end
        self.world.push(
            there.arrive_at(self.world.now + self._delay()), target, self._accepted, (there, accept)
        )
        # The kernel of a stopped process still completes the handshake.
        self.world.push(
            end.arrive_at(self.world.now + 2 * self._delay()), process, self._opened, (end, opened)
        )
        return end

    def _accepted(self, end: End, accept: Callable[[End], None]) -> None:
        if not end.gone:
            accept(end)

    def _opened(self, end: End, opened: Callable[[], None]) -> None:
        if end.up:
            opened()

    def carry(self, source: End, target: End, item: Any) -> None:
        a, b = source.process.name, target.process.name
        if (a, b) in self._cut:
            target.stalled.append(item)
            return
        when = target.arrive_at(self.world.now + self._delay())
        if self.tamper and item[0] == "frame" and (fate := self.tamper.get((a, b))):
            self._tamper(fate.pop(0), when, target, item)
        else:
            self.world.push(when, target.process, self._arrive, (target, item))

    def _tamper(self, how: str, when: float, target: End, item: Any) -> None:
        self.tampered[how] = self.tampered.get(how, 0) + 1
        kind, header, data = item
        copies = 1
        match how:
            case "duplicate":
                copies = 2
            case "reorder":
                when += 0.01  # not counted in arrive_at: later ones overtake it
            case "drop":
                copies = 0
            case "corrupt":
                flipped = bytearray(data)
                flipped[self.world.random.randrange(len(flipped))] ^= 1 << self.world.random.randrange(8)
                item = (kind, header, bytes(flipped))
        for _ in range(copies):
            self.world.push(when, target.process, self._arrive, (target, item))

    def _arrive(self, end: End, item: Any) -> None:
        if end.up:
            end.receive(item)

    def finish(self, end: End, reason: str) -> None:
        """One end is closed or dead: the other one learns of it, if it can be told."""
        other = end.other
        end.gone = True
        end.process.ends.pop(end, None)
        if other is end or not other.up:
            return
        if self.blocked(end.process.name, other.process.name):
            if other.patience_s < 1e6:
                self.world.post(other.patience_s, other.process, self._end, other, "no answer to pings")
            return  # else nobody pings there: it finds out once packets pass again, see broken_at_heal
        when = other.arrive_at(self.world.now + self._delay())
        self.world.push(when, other.process, self._end, (other, reason))

    def _end(self, end: End, reason: str) -> None:
        if end.up:
            end.up = False
            end.process.ends.pop(end, None)
            end.stalled.clear()
            end.down(reason)
            if end.other is not end and end.other.up:
                self.finish(end, "connection reset")

    def broken_at_heal(self) -> None:
        """Connections whose other end is gone answer with a reset once packets pass again."""
        for process in self.world.processes:
            for end in list(process.ends):
                gone = process.alive and end.up and end.other.gone and end.other is not end
                if gone and not self.blocked(end.other.process.name, process.name):
                    self.world.post(self._delay() + 0.2, process, self._end, end, "connection reset")

    def reset(self, a: str, b: str) -> None:
        """Every connection between two processes breaks; what is on its way may arrive before."""
        for end in self._ends(a, b):
            for side in (end, end.other):
                self.world.post(self._delay(), side.process, self._end, side, "connection reset")

    def died(self, process: Process) -> None:
        """The kernel closes a dead process' connections."""
        for address in [a for a, (p, _) in self._listening.items() if p is process]:
            del self._listening[address]
        for end in list(process.ends):
            end.up = False
            self.finish(end, "connection reset by peer")

    def _delay(self) -> float:
        low, high = DELAY_S
        return low + (high - low) * self.world.random.random() + self.delay_s
