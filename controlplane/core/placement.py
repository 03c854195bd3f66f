"""Where things should be: who takes a stage over, and who holds the copy of its KV.

Copies follow a ring over the instances (KevlarFlow): the node that serves (p_i, s) copies to the node that serves
(p_i+1, s). The rule is strict: only a node that serves its own home stage and nothing else is in the ring, so failed
nodes, donors and borrowed places leave it and their predecessors are pointed to other peers.

Nodes on probation (conduct.py) come last for everything: they leave the ring, and serve when nobody else is there.

Where the strict rule finds nobody, any healthy peer with the stage's weights takes the copy (a donor, a spare, a node
that came back and is still blank): with two instances a single failure would otherwise leave both unprotected. It
costs such a node nothing that it needs: replicas are evicted first. A copy is never on the serving node itself. Nodes
of other numerics may serve the stage, but hold no copy.

Fault domains go before all of that: a copy is as far from what it copies as any node is that may have it, also where
that breaks the ring, because a rack takes both otherwise. Who takes a stage over without having a copy of it is, among
those that serve as much, the one furthest from the stage's home: what has taken that may take its neighbours next.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.topology import Mode, Pipeline, Topology
from controlplane.core.membership import NodeView
from controlplane.core.policy import Situation
from controlplane.core.spread import Path, Shelves, outwards

# Nodes of one fault domain that are next to each other in the ring, and passed over without a search.
NEAR_MAX = 4
IN_RING = (False, False, 0)  # the best class of those in the ring's order
OTHERS = 2  # the tier of takers that neither have a copy nor are the home
FAR_BEHIND = 1 << 40  # tokens; a copy of unknown age


def served_counts(topology: Topology) -> Counter[NodeId]:
    """How many stages each node serves."""
    return Counter(
        member.node for pipeline in topology.pipelines for stage in pipeline.stages for member in stage.ranks
    )


class _Shelf(NamedTuple):
    """How a stage's nodes are sorted."""

    stage: int
    labels: tuple[str, ...]  # of fault domains, as whoever asks has them: outermost first
    # In the ring's order, those in the ring before all others; else by name. In both cases first those that are not on
    # probation, then who serves least.
    in_ring: bool = False
    exchange: bool = False  # outside of all domains: whose KV can be exchanged


class Layout:
    """A topology in the making, and what placement asks of it for every stage again."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology  # as it was in the beginning; only its settings count
        self.pipelines = list(topology.pipelines)
        self._homes: dict[int, dict[NodeId, int]] = {}
        self._rings: dict[int, set[NodeId]] = {}
        # The rings in their order: by places of pipelines.
        self._places: dict[int, list[tuple[int, NodeId]]] = {}
        self._shelves: dict[_Shelf, Shelves] = {}
        self._common: dict[int, int] = {}

    @cached_property
    def counts(self) -> Counter[NodeId]:
        """How many stages each node serves."""
        return Counter(m.node for pipeline in self.pipelines for m in pipeline.members())

    @cached_property
    def order(self) -> dict[PipelineId, int]:
        return {p.id: i for i, p in enumerate(self.pipelines)}

    def homes(self, stage: int) -> dict[NodeId, int]:
        """Which pipeline, by its place in the topology, each node is home to."""
        if stage not in self._homes:
            self._homes[stage] = {
                node: i
                for i, p in enumerate(self.pipelines)
                for at in p.stages[stage : stage + 1]  # none, where a topology is not what it should be
                for node in at.homes
            }
        return self._homes[stage]

    def ring(self, stage: int) -> set[NodeId]:
        """Nodes that serve this stage at home and nothing else."""
        if stage not in self._rings:
            places = [at for p in self.pipelines for at in p.stages[stage : stage + 1]]
            self._rings[stage] = {
                m.node for at in places for m in at.ranks if m.node in at.homes and self.counts[m.node] == 1
            }
            homes = self.homes(stage)
            self._places[stage] = sorted((homes[node], node) for node in self._rings[stage])
        return self._rings[stage]

    def put(self, pipeline: Pipeline) -> None:
        """In place of the one of that name. What it looks at depends on its own length, not on the group's size."""
        index = self.order[pipeline.id]
        old = self.pipelines[index]
        touched = {m.node for p in (old, pipeline) for m in p.members()}
        self.counts.subtract(m.node for m in old.members())
        self.counts.update(m.node for m in pipeline.members())
        self.pipelines[index] = pipeline
        for stage, ring in self._rings.items():
            homes = self.homes(stage)
            for node in touched & homes.keys():
                at = self.pipelines[homes[node]].stages[stage]
                inside = self.counts[node] == 1 and any(m.node == node for m in at.ranks)
                if inside is (node in ring):
                    continue
                place = (homes[node], node)
                if inside:
                    ring.add(node)
                    bisect.insort(self._places[stage], place)
                else:
                    ring.remove(node)
                    places = self._places[stage]
                    del places[bisect.bisect_left(places, place)]
        for shelf, shelves in self._shelves.items():
            for node in touched:
                if (of := shelves.of(node)) is not None:
                    shelves.move(node, self._class(shelf, node, bool(of[0])))

    def around(self, pipeline: Pipeline, stage: int) -> Iterator[NodeId]:
        """The ring of a stage from the pipeline's successor on, once round."""
        self.ring(stage)
        places = self._places[stage]
        start = bisect.bisect_left(places, (self.order[pipeline.id] + 1, ""))
        for at in range(start, start + len(places)):
            yield places[at % len(places)][1]

    def lightest(self, s: Situation, stage: int, away: NodeView | None) -> Iterator[NodeId]:
        """Nodes with the stage's weights that may get a duty: first those that are not on probation, and of these who
        serves least; then those that are further from `away`; by name."""
        labels = () if away is None else tuple(away.record.fault_domain)
        shelves = self.shelves(s, _Shelf(stage, labels))
        path = () if away is None else _path(away, labels, False)
        for of in shelves.classes():
            for within, apart in outwards(path, 0, 0):
                yield from shelves.between(of, within, apart, 0, 1)

    def shelves(self, s: Situation, shelf: _Shelf) -> Shelves:
        """The nodes of a stage that may get a duty."""
        if shelf not in self._shelves:
            homes = self.homes(shelf.stage) if shelf.in_ring else {}
            other = len(self.order) if shelf.in_ring else 0
            found = self._shelves[shelf] = Shelves()
            views = s.nodes.by_stage.get(shelf.stage, {})
            for node, view in views.items():
                if view.usable and _free(s, view):
                    path = _path(view, shelf.labels, shelf.exchange)
                    found.add(node, homes.get(node, other), path, self._class(shelf, node, view.demoted))
        return self._shelves[shelf]

    def _class(self, shelf: _Shelf, node: NodeId, demoted: bool) -> tuple[int, ...]:
        if not shelf.in_ring:
            return demoted, self.counts[node]
        strict = node in self.ring(shelf.stage)
        return demoted, not strict, 0 if strict else self.counts[node]

    def common(self, s: Situation, stage: int) -> int:
        """How many fault-domain labels, outermost first, all nodes of a stage share: nobody is further away."""
        if stage not in self._common:
            domains = [view.record.fault_domain for view in s.nodes.by_stage.get(stage, {}).values()]
            same = zip(*(domain.items() for domain in domains), strict=False)
            self._common[stage] = sum(
                1 for _ in itertools.takewhile(lambda labels: len(set(labels)) == 1, same)
            )
        return self._common[stage]


def takers(
    s: Situation,
    pipeline: Pipeline,
    stage: int,
    *,
    keep_kv: bool,
    counts: Counter[NodeId] | None = None,
    among: Iterable[NodeView] | None = None,
) -> list[Member]:
    """Who may serve this stage instead of who serves it now, best first.

    With `keep_kv` a holder of the copy goes before a home that is back but blank: requests run, and what is not in a
    copy has to be computed again. Nobody serves more than two pipelines while another way is left, because half of a
    pool is the quota of one pipeline (contract.topology.quota_blocks). `counts`: how many stages each node serves;
    `among`: only these.
    """
    rank = _rank(s, served_counts(s.topology) if counts is None else counts, pipeline, stage, keep_kv)
    views = s.nodes.by_stage.get(stage, {}).values() if among is None else among
    return sorted((view.member for view in views if able(s, pipeline, view.member)), key=rank)


def first_takers(
    s: Situation, layout: Layout, pipeline: Pipeline, stage: int, *, keep_kv: bool
) -> Iterator[Member]:
    """As `takers`, one after the other, without a look at all of them: holders and homes are ranked, and of the others
    the order is the same for every pipeline."""
    rank = _rank(s, layout.counts, pipeline, stage, keep_kv)
    views = s.nodes.by_stage.get(stage, {})
    near = {m.node for m in _holders(s, pipeline, stage)} | set(pipeline.stages[stage].homes)
    first = [views[node].member for node in near & views.keys() if able(s, pipeline, views[node].member)]
    first.sort(key=rank)
    # Whose tier is better than that of all others comes before they are sorted: mostly that is enough.
    while first and rank(first[0])[:2] < (False, OTHERS):
        yield first.pop(0)
    away = _home(s, pipeline, stage)
    others = (views[node].member for node in layout.lightest(s, stage, away) if node not in near)
    yield from heapq.merge(first, (m for m in others if able(s, pipeline, m)), key=rank)


@dataclass(frozen=True, slots=True)
class Takers:
    """The nodes of `takers` in the same order, found as they are asked for: nearly always the first one is enough."""

    s: Situation
    layout: Layout  # of its topology
    pipeline: Pipeline
    stage: int
    keep_kv: bool
    sound: bool = False  # none that is on probation

    def __iter__(self) -> Iterator[NodeId]:
        found = first_takers(self.s, self.layout, self.pipeline, self.stage, keep_kv=self.keep_kv)
        for member in found:
            if self.sound and member.node in self.s.nodes.demoted:
                return  # they come last
            yield member.node

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None


def free_members(s: Situation, stage: int) -> list[Member]:
    """Who holds a stage's weights and may get a duty: to be found once, where many pipelines ask whether anybody is
    `able`."""
    return [v.member for v in s.nodes.by_stage.get(stage, {}).values() if v.usable and _free(s, v)]


def able(s: Situation, pipeline: Pipeline, member: Member) -> bool:
    """Whether a node's newest process may serve a stage of the pipeline whose weights it holds."""
    view = s.nodes.views[member.node]
    if not view.usable or not _free(s, view):
        return False
    return not any(m.node == member.node and not s.nodes.is_dead(m) for m in pipeline.members())


def _rank(
    s: Situation, counts: Counter[NodeId], pipeline: Pipeline, stage: int, keep_kv: bool
) -> Callable[[Member], tuple[object, ...]]:
    """The order of takers: not on probation, tier, how far behind, how many stages it serves, whether it has a copy,
    how far it is from the home."""
    homes = pipeline.stages[stage].homes
    holders = _holders(s, pipeline, stage)
    away = _home(s, pipeline, stage)

    def key(member: Member) -> tuple[bool, int, int, int, bool, int, NodeId]:
        lag = holders.get(member)
        light = lag is not None and counts[member.node] <= 1
        home = member.node in homes
        tier = (0 if light else 1 if home else OTHERS) if keep_kv else (0 if home else 1 if light else OTHERS)
        behind = lag if light and lag is not None else 0
        view = s.nodes.views[member.node]
        return view.demoted, tier, behind, counts[member.node], lag is None, _shared(away, view), member.node

    return key


def replica_target(s: Situation, layout: Layout, pipeline: Pipeline, stage: int) -> Member | None:
    """Where the copy of this stage should be in that layout; None: nowhere, or nobody is left."""
    source = pipeline.stages[stage].leader
    if layout.topology.mode is not Mode.REPLICATE or source is None:
        return None
    order, ring, counts = layout.homes(stage), layout.ring(stage), layout.counts
    start, count = layout.order[pipeline.id], len(layout.order)
    inside = {m.node for m in pipeline.members() if not s.nodes.is_dead(m)}
    here = s.nodes.views.get(source.node)

    def key(view: NodeView) -> tuple[bool, int, bool, int, int, NodeId]:
        node = view.member.node
        strict = node in ring
        distance = (order[node] - start) % count if node in order else count
        return view.demoted, _shared(here, view), not strict, 0 if strict else counts[node], distance, node

    current = pipeline.stages[stage].replicas

    def fit(view: NodeView) -> bool:
        if view.member.node in inside or not _free(s, view) or not s.nodes.exchange(source, view.member):
            return False
        # A target under suspicion keeps its duty and gets no new one.
        kept = view.member in current and view.registered and not s.nodes.is_dead(view.member)
        return view.usable or kept

    views = s.nodes.by_stage.get(stage, {})
    least = layout.common(s, stage)
    # The next one of the ring that is furthest away goes before all others, and is mostly found at once.
    for node in itertools.islice(layout.around(pipeline, stage), NEAR_MAX):
        view = views.get(node)
        if view is not None and not view.demoted and _shared(here, view) <= least and fit(view):
            return view.member
    kept = [view for m in current if (view := views.get(m.node)) is not None and fit(view)]
    first = next((views[node] for node in _far_in_ring(s, layout, pipeline, stage) if fit(views[node])), None)
    far = [
        view
        for view in kept
        if view.member.node in ring and not view.demoted and _shared(here, view) <= least
    ]
    far += [first] if first is not None else []
    if far:
        return min(
            far, key=lambda view: ((order[view.member.node] - start - 1) % count, view.member.node)
        ).member
    shelves, path, base = _around(s, layout, pipeline, stage)
    found = kept
    for demoted in (False, True):
        if demoted and any(not view.demoted for view in found):
            break
        classes = [of for of in shelves.classes() if of[0] == demoted]
        nodes = (
            node
            for within, apart in outwards(path, base, base + least)
            for of in classes
            for node in shelves.between(of, within, apart, start, count)
        )
        best = next((views[node] for node in nodes if fit(views[node])), None)
        found += [best] if best is not None else []
    return min(found, key=key).member if found else None


def _around(s: Situation, layout: Layout, pipeline: Pipeline, stage: int) -> tuple[Shelves, Path, int]:
    """Who may hold copies of a stage, sorted, the place of whoever serves it in that, and how much of the place is no
    fault domain but what its KV is good for."""
    source = pipeline.stages[stage].leader
    here = s.nodes.views.get(source.node) if source is not None else None
    labels = () if here is None else tuple(here.record.fault_domain)
    exchange = here is not None and here.member == source
    shelves = layout.shelves(s, _Shelf(stage, labels, in_ring=True, exchange=exchange))
    return shelves, () if here is None else _path(here, labels, exchange), int(exchange)


def _far_in_ring(s: Situation, layout: Layout, pipeline: Pipeline, stage: int) -> Iterator[NodeId]:
    """Those of the ring that are as far from whoever serves the stage as anybody, from the pipeline's successor on."""
    shelves, path, base = _around(s, layout, pipeline, stage)
    within, apart = next(outwards(path, base, base + layout.common(s, stage)))
    start, count = layout.order[pipeline.id], len(layout.order)
    return shelves.between(IN_RING, within, apart, start + 1, count)


def is_target(s: Situation, layout: Layout, pipeline: Pipeline, stage: int, member: Member) -> bool:
    """Whether a living copy is where `replica_target` wants one, told without a search: in the ring its node is the
    next of those that are furthest away. So are nearly all copies; False means only that a search has to tell."""
    source = pipeline.stages[stage].leader
    if layout.topology.mode is not Mode.REPLICATE or source is None:
        return False
    here, least = s.nodes.views.get(source.node), layout.common(s, stage)
    for node in itertools.islice(layout.around(pipeline, stage), NEAR_MAX):
        if node == member.node:
            break
        other = s.nodes.views.get(node)
        if other is not None and _shared(here, other) <= least:
            return False
    else:
        alone = pipeline.stages[stage].replicas == (member,)  # one under suspicion may go first
        if not alone or next(_far_in_ring(s, layout, pipeline, stage), None) != member.node:
            return False
    view = s.nodes.views.get(member.node)
    return (
        view is not None
        and view.record.stage == stage
        and view.member == member
        and view.usable
        and not view.demoted
        and member not in s.nodes.dead
        and _free(s, view)
        and not any(m.node == member.node for m in pipeline.members())
        and s.nodes.exchange(source, member)
        and _shared(here, view) <= least
    )


def _home(s: Situation, pipeline: Pipeline, stage: int) -> NodeView | None:
    """The stage's home, if it is still known where that stood."""
    return next((s.nodes.views[node] for node in pipeline.stages[stage].homes if node in s.nodes.views), None)


def _holders(s: Situation, pipeline: Pipeline, stage: int) -> dict[Member, int]:
    """Who has a copy of the stage's KV, and how many tokens it lacks. A move's destination has one as well."""
    move = pipeline.move
    copies = pipeline.stages[stage].replicas
    if move is not None and move.stage == stage and move.to not in copies:
        copies = (*copies, move.to)
    holders: dict[Member, int] = {}
    for member in copies:
        lag = s.nodes.lag(pipeline, stage, member)
        holders[member] = FAR_BEHIND if lag is None else lag
    return holders


def _free(s: Situation, view: NodeView) -> bool:
    """Whether it may get a duty at all. On probation a node is avoided, but one that serves or copies beats none."""
    node = view.member.node
    if node in s.avoid and (not view.demoted or node in s.topology.cordoned):  # who is cordoned is avoided
        return False
    return view.member not in s.topology.retired


def _path(view: NodeView, labels: tuple[str, ...], exchange: bool) -> Path:
    """Where it is, by these labels; what its KV is good for comes first, if that counts."""
    domain = view.record.fault_domain
    path = tuple(map(domain.get, labels))
    return (view.record.numerics, *path) if exchange else path


def _shared(here: NodeView | None, there: NodeView) -> int:
    """How many fault-domain labels two nodes have in common, outermost first: fewer is safer."""
    if here is None:
        return 0
    shared = 0
    ours, theirs = here.record.fault_domain, there.record.fault_domain
    for label, value in ours.items():
        if theirs.get(label) != value:
            break
        shared += 1
    return shared
