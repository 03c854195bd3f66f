"""What is compared under a trace of faults: ours, ours with every loss computed again, and standard fault behaviour.

`standard`: tensor parallelism on a power of two of ranks. When one of them dies, all requests begin again after a
restart with the largest power of two that is alive and has room for the model. It is run twice, once restarting as
soon as a larger one is possible and once only when it must; the better of both counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.failsafe_group import Engine, Queue, Served
from bench.failsafe_model import BANDWIDTH, BLOCK_TOKENS, FLOAT_SUM_BYTES, Cost, Model
from bench.failsafe_traces import Event, Group, Lengths
from dataplane.core.ranks.choice import Prediction, Way, choose
from dataplane.core.ranks.recovery import Held, Plan, plan
from kernels.ranks.layout import Layout, Shape, first_layout, next_layout

DETECT_S = 0.1  # from a death to the decision, for all
# Of an engine: processes, libraries, graphs; a rank that returns starts while the others serve.
START_S = 60.0
DISK_BYTES_PER_S = 6e9  # weights for a restart, by all ranks of a machine together


def restart_s(model: Model, start_s: float = START_S) -> float:
    return start_s + model.weight_bytes / DISK_BYTES_PER_S


def shape_of(model: Model) -> Shape:
    return Shape(model.layers, model.kv_heads, model.shards)


@dataclass(slots=True)
class Outcome:
    served: Served
    seconds: float
    pauses: list[float] = field(default_factory=list)  # of losses that were survived
    restarts: int = 0
    down_s: float = 0.0
    recomputed: int = 0  # requests that had to begin again

    @property
    def tokens_per_s(self) -> float:
        return self.served.tokens / self.seconds


class Run(ABC):
    """A group in virtual time. Subclasses say what losses and returns do."""

    def __init__(
        self, model: Model, lengths: Sequence[Lengths], group: Group, seconds: float, exact: bool
    ) -> None:
        self.model, self.seconds = model, seconds
        self.outcome = Outcome(Served(), seconds)
        self.engine = Engine(model, Queue(lengths), self.outcome.served, exact)
        self.alive = set(group.up)
        self.now = 0.0
        self.serving = False
        self._events = sorted(group.events, key=lambda event: event.at_s)
        self.timers: list[tuple[float, int]] = []  # what is due later, and of which rank

    def run(self) -> Outcome:
        self.begin()
        while self.now < self.seconds:
            until = min(self.seconds, self._next_s())
            if self.now < until:
                if self.serving:
                    self.now = self.engine.step(self.now, until)
                else:
                    self.outcome.down_s += until - self.now
                    self.now = until
            self._happen()
        return self.outcome

    def _next_s(self) -> float:
        events = [self._events[0].at_s] if self._events else []
        return min(events + [at for at, _ in self.timers], default=float("inf"))

    def _happen(self) -> None:
        """What came until now: losses of one moment are one loss."""
        lost, back = set[int](), set[int]()
        while self._events and self._events[0].at_s <= self.now:
            event: Event = self._events.pop(0)
            (self.alive.add if event.up else self.alive.discard)(event.rank)
            (back.add if event.up else back.discard)(event.rank)
            if not event.up:
                lost.add(event.rank)
        self.timers = [(at, rank) for at, rank in self.timers if rank not in lost]
        if lost:
            self.lost(lost)
        if back:
            self.back(back)
        due = [rank for at, rank in self.timers if at <= self.now]
        self.timers = [(at, rank) for at, rank in self.timers if at > self.now]
        if due:
            self.due(due)

    @abstractmethod
    def begin(self) -> None:
        """The trace begins."""

    @abstractmethod
    def lost(self, ranks: set[int]) -> None:
        """These have died."""

    @abstractmethod
    def back(self, ranks: set[int]) -> None:
        """These have returned."""

    @abstractmethod
    def due(self, ranks: list[int]) -> None:
        """What these waited for is there."""


class Ours(Run):
    """Goes on with whichever ranks are left. `shelf`: what is lost is restored; else it is computed again."""

    def __init__(
        self,
        model: Model,
        lengths: Sequence[Lengths],
        group: Group,
        seconds: float,
        exact: bool = True,
        shelf: bool = True,
    ) -> None:
        super().__init__(model, lengths, group, seconds, exact)
        self._shelf = shelf
        self._ready = set(group.up)  # alive and started

    def begin(self) -> None:
        self._start_afresh()

    def lost(self, ranks: set[int]) -> None:
        self._ready -= ranks
        if not self.serving or not ranks & set(self.engine.layout.ranks):
            return
        left = [rank for rank in self.engine.layout.ranks if rank not in ranks]
        if not left or not self._shrinks(left):
            self.engine.give_up_all()
            self.serving = False

    def back(self, ranks: set[int]) -> None:
        self.timers += [(self.now + START_S, rank) for rank in sorted(ranks)]

    def due(self, ranks: list[int]) -> None:
        self._ready |= set(ranks)
        if not self.serving:
            self._start_afresh()
        else:
            self._take_in()

    def _start_afresh(self) -> None:
        """All weights are read; there are no requests."""
        if not self._ready:
            return
        layout = first_layout(shape_of(self.model), len(self._ready))
        layout = next_layout(layout, self._ready)
        self.engine.serve(layout)
        self.serving = self.engine.cost.fits
        if self.serving:
            self.now += self.model.weight_bytes / len(self._ready) / BANDWIDTH.host

    def _shrinks(self, left: list[int]) -> bool:
        """False: what is left cannot serve. The other way is to restart what is left as standard does."""
        engine, model = self.engine, self.model
        before = engine.layout
        after = next_layout(before, left)
        cost = Cost(model, after, engine.sum_bytes)
        made = self._plan(before, after)
        shrink = Prediction(
            Way.SHRINK,
            DETECT_S + made.seconds(model.sizes, BANDWIDTH),
            float(len(left)) if cost.fits else 0.0,
        )
        whole = 1 << (len(left).bit_length() - 1)
        restart = Prediction(Way.RESTART, restart_s(model), float(whole) if fits(model, whole) else 0.0)
        # Capacities in ranks, as if throughput followed their number; a repair takes some minutes at least.
        way = choose((shrink, restart), demand=float(len(before.ranks)), repair_s=600.0)
        if way is None or way.way is not Way.SHRINK:
            return False
        self.outcome.pauses.append(way.pause_s)
        self.now += way.pause_s
        self.outcome.recomputed += engine.change(after, made.resume)
        return True

    def _take_in(self) -> None:
        """KV and weights go to the rank while the others serve. What that takes of the links is charged as if they
        stood still: it is little, and how it would slow them down was not measured."""
        before = self.engine.layout
        after = next_layout(before, self._ready)
        made = self._plan(before, after)
        self.now += made.seconds(self.model.sizes, BANDWIDTH)
        self.outcome.recomputed += self.engine.change(after, made.resume)

    def _plan(self, before: Layout, after: Layout) -> Plan:
        engine = self.engine
        held = [
            Held(
                each.number,
                engine.owner(each.number),
                each.computed // BLOCK_TOKENS,
                engine.on_shelf(each) if self._shelf else 0,
            )
            for each in engine.running()
        ]
        engine.router.change(after.ranks)
        owners = {each.request: engine.owner(each.request) for each in held}
        return plan(before, after, held, owners, self.model.sizes)


class Standard(Run):
    def __init__(
        self, model: Model, lengths: Sequence[Lengths], group: Group, seconds: float, grows: bool
    ) -> None:
        super().__init__(model, lengths, group, seconds, exact=False)
        self._grows = grows
        self._used: list[int] = []

    def begin(self) -> None:
        self._used = self._choose()
        self.serving = bool(self._used) and self.engine.start(len(self._used))

    def lost(self, ranks: set[int]) -> None:
        if ranks & set(self._used):
            self._restart()

    def back(self, ranks: set[int]) -> None:
        if not self._used or (self._grows and len(self._choose()) > len(self._used)):
            self._restart()

    def due(self, ranks: list[int]) -> None:
        self.serving = self.engine.start(len(self._used))

    def _choose(self) -> list[int]:
        most = len(self.alive)
        while most:
            count = 1 << (most.bit_length() - 1)
            if fits(self.model, count):
                return sorted(self.alive, key=lambda rank: (rank not in self._used, rank))[:count]
            most = count - 1
        return []

    def _restart(self) -> None:
        if self.serving:
            self.outcome.recomputed += len(self.engine.running())
            self.engine.give_up_all()
        self.serving = False
        self._used = self._choose()
        self.timers = []
        if self._used:
            self.outcome.restarts += 1
            self.timers = [(self.now + DETECT_S + restart_s(self.model), self._used[0])]


_FITS: dict[tuple[Model, int], bool] = {}


def fits(model: Model, ranks: int) -> bool:
    """Whether the model has room on so many ranks, as `standard` cuts it."""
    if (model, ranks) not in _FITS:
        _FITS[model, ranks] = Cost(model, first_layout(shape_of(model), ranks), FLOAT_SUM_BYTES).fits
    return _FITS[model, ranks]


def standard(model: Model, lengths: Sequence[Lengths], group: Group, seconds: float) -> Outcome:
    """The better of restarting for more ranks at once and of doing so only when it must."""
    runs = (Standard(model, lengths, group, seconds, grows).run() for grows in (True, False))
    return max(runs, key=lambda outcome: outcome.tokens_per_s)
