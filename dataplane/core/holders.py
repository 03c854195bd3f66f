"""Which instance holds the copy of a request's KV, where each request has a holder of its own (LUMEN; pure).

The scheduler that runs a request chooses when its prefill ends: `argmin_w (queue_w + lambda * recovery_w)`, where
`queue_w` is what w has to do, as w says on its links, and `recovery_w` what w would already inherit if this instance
failed. Both are work in tokens (contract/loads.py), so the requests of an instance that fails are spread as if they
were new ones. With `fixed` it is the next instance of the ring whatever that has to do, to compare with.

A copy is first of all wanted (`orders` tell the stages), and counts from when every stage has said that its part is
there (`copied`). Loads and members change: a copy moves if that is worth it, the new one before the old one goes, and
few at a time.

    wanted at B -> all stages have copied -> held by B -> wanted at C, too -> all have copied -> held by C, B's goes
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.loads import REQUEST_WORK
from controlplane.contract.topology import HOLDER_MODES, Pipeline, Topology
from dataplane.core.messages import Place

# Instances that an instance chooses among: those next to it in the ring, to whom it keeps links.
CANDIDATES = 8
RECOVERY_WEIGHT = 1.0  # lambda
# Copies that move for the sake of loads, or because their holder is gone: each is sent again as a whole.
MOVES_PER_S = 4.0
MOVES_AT_ONCE = 4
# What must be gained for a copy to move: of what its holder would have to do, and in tokens of work.
GAIN_MIN, GAIN_WORK_MIN = 0.25, 4 * REQUEST_WORK
# A prompt that is computed within a moment says nothing of what an instance will have to do when another one fails.
SMOOTHED_S = 3.0
LOOKED_BACK = 64  # instances before one in the ring that may have it among their candidates
LOAD_KEPT_S = 5.0  # what an instance said of its load is believed for so long
# No stage says for so long that a copy is there: its holder may have no room for it. Twice as long after each attempt,
# for it may also be long.
COPY_LIMIT_S, COPY_LIMIT_MAX_S = 5.0, 320.0
SHUNNED_S = 30.0  # a holder where a copy got no further is given no more for so long, if others take them


@dataclass(slots=True)
class _Placed:
    holder: PipelineId | None = None  # has all that every stage had when it was chosen
    coming: PipelineId | None = None  # is being sent that
    missing: set[int] = field(default_factory=set)  # stages that have not said so
    limit_s: float = COPY_LIMIT_S  # until it is sent elsewhere

    @property
    def goal(self) -> PipelineId | None:
        return self.coming or self.holder


class Holders:
    """Of all requests of one pipeline. Times in seconds, monotonic."""

    def __init__(self, stages: int, *, fixed: bool = False, weight: float = RECOVERY_WEIGHT) -> None:
        self.fixed = fixed
        self.moved = 0  # monotonic
        self._stages = stages
        self._weight = weight
        self._candidates: tuple[PipelineId, ...] = ()  # in the order of the ring
        # What it has to do lately, and when it said so.
        self._loads: dict[PipelineId, tuple[float, float]] = {}
        self._placed: dict[int, _Placed] = {}
        self._inherits: Counter[PipelineId] = Counter()  # requests that it holds or is about to hold
        self._orders: dict[int, None] = {}  # requests of which stages have to be told something
        self._news: dict[int, None] = {}  # requests of which gateways have to be told something
        self._homeless: dict[int, None] = {}  # requests that nobody holds or is sent, oldest first
        # Requests whose copies are coming, and since when that gets no further; None: since the next tick.
        self._coming: dict[int, float | None] = {}
        self._shunned: dict[PipelineId, float] = {}  # until when
        self._moves = float(MOVES_AT_ONCE)
        self._at: float | None = None

    def __contains__(self, rid: int) -> bool:
        return rid in self._placed

    def holder(self, rid: int) -> PipelineId | None:
        """Who would go on with the request without computing it again; None: nobody."""
        placed = self._placed.get(rid)
        return None if placed is None else placed.holder

    # ------------------------------------------------------------------ what is known of others

    def allow(self, candidates: Sequence[PipelineId]) -> None:
        """Who can hold copies from now on, in the order of the ring. What others hold counts no longer."""
        if self._candidates == tuple(candidates):
            return
        self._candidates = tuple(candidates)
        self._loads = {id_: load for id_, load in self._loads.items() if id_ in self._candidates}
        self._shunned = {id_: until for id_, until in self._shunned.items() if id_ in self._candidates}
        for rid, placed in self._placed.items():
            if placed.coming is not None and placed.coming not in self._candidates:
                placed.coming = None
                self._coming.pop(rid, None)
                self._orders[rid] = None
            if placed.holder is not None and placed.holder not in self._candidates:
                placed.holder = None
                self._orders[rid] = self._news[rid] = None
            if placed.goal is None:
                self._homeless[rid] = None
        self._inherits = Counter(p.goal for p in self._placed.values() if p.goal is not None)

    def heard(self, pipeline: PipelineId, work: int, now: float) -> None:
        """An instance says how much it has to do."""
        if pipeline in self._candidates:
            before, at = self._loads.get(pipeline, (work, now))
            kept = math.exp(-max(0.0, now - at) / SMOOTHED_S)
            self._loads[pipeline] = before * kept + work * (1.0 - kept), now

    # ------------------------------------------------------------------ requests

    def place(self, rid: int, now: float) -> None:
        """Its prefill has ended: choose who holds its KV."""
        placed = self._placed.get(rid)
        if placed is None:
            placed = self._placed[rid] = _Placed()
        if placed.goal is None:
            self._want(rid, placed, self._best(now))

    def release(self, rid: int) -> None:
        """It has ended, or its KV has been given back: stages drop its copies with it."""
        placed = self._placed.pop(rid, None)
        if placed is not None and placed.goal is not None:
            self._inherits[placed.goal] -= 1
        for book in (self._orders, self._news, self._homeless, self._coming):
            book.pop(rid, None)

    def copied(self, stage: int, rid: int, holder: PipelineId) -> None:
        """A stage says that this holder has what it had of the request when it was told to copy it there."""
        placed = self._placed.get(rid)
        if placed is None or placed.coming != holder:
            return
        if stage in placed.missing:
            placed.missing.discard(stage)
            self._coming[rid] = None
        if not placed.missing:
            placed.holder, placed.coming = holder, None
            placed.limit_s = COPY_LIMIT_S
            self._coming.pop(rid, None)
            self._shunned.pop(holder, None)
            self._orders[rid] = self._news[rid] = None

    def lost(self, stage: int, rid: int, holder: PipelineId) -> None:
        """A stage says that this holder has its copy no longer. The stage sends it again, where it is still wanted."""
        placed = self._placed.get(rid)
        if placed is None:
            return
        if placed.coming == holder:
            placed.missing.add(stage)
        elif placed.holder == holder:
            placed.holder = None
            if placed.coming is None:
                placed.coming, placed.missing = holder, set(range(self._stages))
                self._coming[rid] = None
            self._orders[rid] = self._news[rid] = None

    def reset(self) -> None:
        """What stages were told may be lost: they are told anew. What is held is held."""
        for rid, placed in self._placed.items():
            self._orders[rid] = None
            if placed.coming is not None:
                placed.missing = set(range(self._stages))
        self._coming = dict.fromkeys(self._coming)

    def tell(self, rid: int) -> None:
        """Somebody else reads the request now: say again who holds it."""
        if rid in self._placed:
            self._news[rid] = None

    def tick(self, now: float) -> None:
        """Find a holder for those that have none, then move copies where that is worth most; few a second."""
        passed_s = now - self._at if self._at is not None else 0.0
        self._at = now
        self._moves = min(float(MOVES_AT_ONCE), self._moves + passed_s * MOVES_PER_S)
        while self._moves >= 1.0 and (rid := self._movable(now)) is not None:
            placed = self._placed[rid]
            self._want(rid, placed, self._best(now))
            if placed.goal is None:
                return  # nobody can hold anything
            self._moves -= 1.0
            self.moved += 1

    # ------------------------------------------------------------------ what is to be said

    def orders(self) -> tuple[Place, ...]:
        """For the stages, with the next step: who is to have copies of which request, and nobody else."""
        found = []
        for rid in self._orders:
            placed = self._placed[rid]
            found.append(Place(rid, tuple(p for p in (placed.coming, placed.holder) if p is not None)))
        self._orders.clear()
        return tuple(found)

    @property
    def ordered(self) -> bool:
        return bool(self._orders)

    def news(self) -> Iterator[tuple[int, PipelineId | None]]:
        """For gateways: who holds which request from now on; None: nobody."""
        told, self._news = self._news, {}
        for rid in told:
            yield rid, self._placed[rid].holder

    # ------------------------------------------------------------------ choosing

    def _want(self, rid: int, placed: _Placed, holder: PipelineId | None) -> None:
        if placed.goal is not None:
            self._inherits[placed.goal] -= 1
        placed.coming = holder if holder != placed.holder else None
        placed.missing = set(range(self._stages)) if placed.coming is not None else set()
        if placed.coming is not None:
            self._coming[rid] = None
        else:
            self._coming.pop(rid, None)
        if placed.goal is not None:
            self._inherits[placed.goal] += 1
            self._homeless.pop(rid, None)
        else:
            self._homeless[rid] = None
        self._orders[rid] = None

    def _late(self, now: float) -> int | None:
        """A request whose copy gets no further where it is sent, if somebody else may take it."""
        for rid, since in self._coming.items():
            placed = self._placed[rid]
            if since is None:
                self._coming[rid] = since = now
            if placed.coming is None or now - since < placed.limit_s:
                continue
            self._shunned[placed.coming] = now + SHUNNED_S
            best = self._best(now)
            if best is not None and self._shunned.get(best, 0.0) <= now:
                placed.limit_s = min(2.0 * placed.limit_s, COPY_LIMIT_MAX_S)
                return rid
            self._coming[rid] = now  # nobody does better: it is looked at again later
        return None

    def _willing(self, now: float) -> list[PipelineId]:
        """Candidates that take copies, as far as is known; all of them if none does."""
        return [id_ for id_ in self._candidates if self._shunned.get(id_, 0.0) <= now] or [*self._candidates]

    def _queue(self, now: float) -> dict[PipelineId, float]:
        """What each candidate has to do. Who has said nothing lately counts as the busiest: it may be."""
        known = {id_: work for id_, (work, at) in self._loads.items() if now - at <= LOAD_KEPT_S}
        most = max(known.values(), default=0.0)
        return {id_: known.get(id_, most) for id_ in self._candidates}

    def _cost(self, holder: PipelineId, queue: float) -> float:
        return queue + self._weight * REQUEST_WORK * self._inherits[holder]

    def _best(self, now: float) -> PipelineId | None:
        if self.fixed or not self._candidates:
            return next(iter(self._candidates), None)
        queue = self._queue(now)
        return min(self._willing(now), key=lambda id_: self._cost(id_, queue[id_]))

    def _movable(self, now: float) -> int | None:
        """The request whose copy should move first: one without a holder, else one that gets no further where it is
        sent, else one of the busiest holder's, the newest, if the least busy candidate would have much less to do even
        with it."""
        if not self._candidates:
            return None
        if self._homeless:
            return next(iter(self._homeless))
        if self.fixed:
            first = self._candidates[0]
            return next((rid for rid, p in self._placed.items() if p.goal != first), None)
        if (late := self._late(now)) is not None:
            return late
        queue = self._queue(now)
        costs = {id_: self._cost(id_, queue[id_]) for id_ in self._candidates}
        held = [id_ for id_ in self._candidates if self._inherits[id_]]
        if not held:
            return None
        busiest = max(held, key=lambda id_: costs[id_])
        gain = costs[busiest] - min(costs[id_] for id_ in self._willing(now)) - self._weight * REQUEST_WORK
        if gain <= max(GAIN_WORK_MIN, GAIN_MIN * costs[busiest]):
            return None
        rids = (rid for rid, p in reversed(self._placed.items()) if p.holder == busiest and p.coming is None)
        return next(rids, None)


def candidates_of(topology: Topology, pipeline: Pipeline, hosts: Mapping[NodeId, str]) -> list[Pipeline]:
    """Pipelines that may hold copies of this one's requests: the next ones in the ring that are up, stay, and are in no
    fault domain of its own; if there is none of these, others. `hosts`: of nodes, where they are known."""
    if topology.mode not in HOLDER_MODES:
        return []
    order = topology.pipelines
    at = next(index for index, other in enumerate(order) if other.id == pipeline.id)
    ours = {member.node for member in pipeline.members()}
    our_hosts = _hosts(ours, hosts)
    apart: list[Pipeline] = []
    beside: list[Pipeline] = []
    for step in range(1, len(order)):
        other = order[(at + step) % len(order)]
        theirs = {member.node for member in other.members()}
        if not other.up or other.closing or not ours.isdisjoint(theirs):
            continue
        (apart if our_hosts.isdisjoint(_hosts(theirs, hosts)) else beside).append(other)
        if len(apart) == CANDIDATES:
            break
    return apart or beside[:CANDIDATES]


def sources_of(topology: Topology, pipeline: Pipeline, hosts: Mapping[NodeId, str]) -> list[Pipeline]:
    """Pipelines that have this one among their candidates: those before it in the ring."""
    if topology.mode not in HOLDER_MODES:
        return []
    order = topology.pipelines
    at = next(index for index, other in enumerate(order) if other.id == pipeline.id)
    before = (order[(at - step) % len(order)] for step in range(1, min(len(order), LOOKED_BACK + 1)))
    return [other for other in before if pipeline in candidates_of(topology, other, hosts)]


def leaders_at(pipelines: Iterable[Pipeline], stage: int) -> dict[PipelineId, Member]:
    """Who serves this stage of each of them that has it."""
    leaders = {p.id: p.leader_at(stage) for p in pipelines}
    return {id_: member for id_, member in leaders.items() if member is not None}


def _hosts(nodes: Iterable[NodeId], hosts: Mapping[NodeId, str]) -> set[str]:
    """A node whose host is not known counts as one of its own."""
    return {hosts.get(node, node) for node in nodes}
