"""Whom a node keeps links to, and what its links say of others.

Links are few, however many nodes there are: to everybody whom a pipeline names that names this node (who serves, who
holds a copy and may have to serve at once, who is at home there), so that a failover opens none; and to the nearest
ones by name that hold the same stage. Those watch each other: a process that is stopped closes no connection, and
silence on links is the second kind of evidence that a controller asks for. Both ends come to the same choice by
themselves; one that has not heard the news yet goes on speaking, and is listened to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from controlplane.contract.ids import Member, NodeId
from controlplane.contract.records import NodeRecord
from controlplane.contract.reports import NO_LINK, LinkReport
from controlplane.contract.topology import Pipeline, Topology

PING_S = 0.2  # a link that had nothing to carry for this long carries a ping
PINGS_TO_DEAD = 3  # ... or sooner: so many fit into `timing.dead_after_s`, so that a late one is no silence
WATCHED = 2  # nodes of its stage that a node watches, on each side of it by name
LINGER_S = 30.0  # a link that nobody wants is closed when nothing has come from its other end for this long

Heard = Callable[[NodeId], float | None]
"""When a node was last heard on a link, on the clock of `now`; None: never."""


@dataclass(slots=True)
class Peers:
    me: Member
    stage: int
    dead_after_s: float = math.inf  # silence on a link that counts against who should have filled it
    _named: set[NodeId] = field(default_factory=set)  # by our pipelines
    _wanted: set[NodeId] = field(default_factory=set)
    _neighbours: dict[Member, float] = field(default_factory=dict)  # since when
    _watched: dict[Member, float] = field(default_factory=dict)  # the same; no pipeline needs them
    _links: dict[NodeId, NodeRecord] = field(default_factory=dict)  # whom we have, or are opening, a link to
    _unwanted: dict[NodeId, float] = field(default_factory=dict)  # of those: since when
    _down: dict[Member, str] = field(default_factory=dict)  # links that broke, and why
    _sent_at: dict[Member, float] = field(default_factory=dict)

    def follow(
        self,
        pipelines: Iterable[Pipeline],
        records: Mapping[NodeId, NodeRecord],
        now: float,
        partners: Collection[NodeId] = (),
    ) -> list[NodeRecord]:
        """Those to have a link to from now on. `pipelines`: those that name us; `records`: who is registered;
        `partners`: whom we exchange parity with."""
        pipelines = list(pipelines)
        neighbours = sorted(neighbours_of(pipelines, self.me))
        mates = [node for node, record in records.items() if record.stage == self.stage]
        around = ring(mates, self.me.node)
        watched = [member for node in around if (member := records[node].member) not in neighbours]
        since = self._neighbours | self._watched
        self._neighbours = {member: since.get(member, now) for member in neighbours}
        self._watched = {member: since.get(member, now) for member in watched}
        self._named = {member.node for pipeline in pipelines for member in _members(pipeline)}
        homes = {home for pipeline in pipelines for stage in pipeline.stages for home in stage.homes}
        # A node that lost its registration but serves with us is alive: etcd was away.
        self._wanted = (
            self._named | (homes & records.keys()) | set(around) | (set(partners) & records.keys())
        ) - {self.me.node}
        for node in self._wanted & records.keys():
            self._links[node] = records[node]
        known = {record.member for record in self._links.values() if record.member.node in records}
        self._down = {m: why for m, why in self._down.items() if m in known or m in self._neighbours}
        self._sent_at = {m: at for m, at in self._sent_at.items() if m in known or m in self._neighbours}
        return [self._links[node] for node in sorted(self._wanted & self._links.keys())]

    def unused(self, records: Mapping[NodeId, NodeRecord], heard: Heard, now: float) -> list[NodeId]:
        """Those to have no link to any more: nobody there, or nobody at either end has used it for a while."""
        closing = []
        unwanted = self._links.keys() - self._wanted
        self._unwanted = {node: self._unwanted.get(node, now) for node in unwanted}
        for node, since in self._unwanted.items():
            if node not in records or now - max(since, heard(node) or 0.0) >= LINGER_S:
                closing.append(node)
        for node in closing:
            del self._links[node], self._unwanted[node]
            self._down = {m: why for m, why in self._down.items() if m.node != node}
        return sorted(closing)

    # ------------------------------------------------------------------ what links do

    def sent(self, peer: Member, now: float) -> None:
        self._sent_at[peer] = now

    def opened(self, peer: Member) -> None:
        self._down.pop(peer, None)

    def broke(self, peer: Member, why: str) -> None:
        """A link from or to it ended. One that nobody wants is closed on purpose, which says nothing of its process."""
        if peer.node in self._wanted:
            self._down[peer] = why

    def is_down(self, peer: Member) -> bool:
        return peer in self._down

    def to_ping(self, now: float) -> list[Member]:
        """Who expects to hear something now."""
        every_s = min(PING_S, self.dead_after_s / PINGS_TO_DEAD)
        return [
            peer
            for peer in (*self._neighbours, *self._watched)
            if now - self._sent_at.get(peer, 0.0) >= every_s
        ]

    def report(self, heard: Heard, now: float) -> Iterator[LinkReport]:
        for member, why in self._down.items():
            watch, refused = member.node not in self._named, why.startswith(NO_LINK)
            yield LinkReport(member, False, 0.0, why, watch, refused)
        for member, since in self._neighbours.items():
            if member not in self._down:
                yield LinkReport(member, True, now - max(heard(member.node) or since, since))
        for member, since in self._watched.items():
            at = heard(member.node)
            # Before its first word it may not know that it is watched.
            if member not in self._down and at is not None and at >= since:
                yield LinkReport(member, True, now - at, watch=True)


def pipelines_of(topology: Topology, me: Member) -> list[Pipeline]:
    """Those that name us: we serve, hold a copy, are about to serve, or are at home there. One scan for each write."""
    return [
        p
        for p in topology.pipelines
        if any(me in stage.ranks or me in stage.replicas or me.node in stage.homes for stage in p.stages)
        or (p.move is not None and p.move.to == me)
    ]


def engages(pipeline: Pipeline, me: Member) -> bool:
    """Whether we do something for it, and are not only at home there."""
    return me in _members(pipeline)


def neighbours_of(pipelines: Iterable[Pipeline], me: Member) -> set[Member]:
    """The members whose silence we would notice: those that exchange steps or copies with us."""
    found: set[Member] = set()
    for pipeline in pipelines:
        leaders = [stage.leader for stage in pipeline.stages]
        for index, stage in enumerate(pipeline.stages):
            mine, count = leaders[index], len(leaders)
            around = {leaders[(index + 1) % count], leaders[index - 1], *stage.replicas}
            if pipeline.move is not None and pipeline.move.stage == index:
                around.add(pipeline.move.to)
            if mine == me:
                found.update(m for m in around if m is not None)
            elif mine is not None and me in around:
                found.add(mine)
    found.discard(me)
    return found


def ring(names: Iterable[NodeId], me: NodeId) -> list[NodeId]:
    """The `WATCHED` next ones by name on each side of us, n2 before n10, in a ring. Whoever is among ours has us
    among its own, if both know the same names."""
    ordered = sorted({*names, me}, key=lambda name: (len(name), name))
    at, count = ordered.index(me), len(ordered)
    near = {ordered[(at + step) % count] for step in range(-WATCHED, WATCHED + 1)}
    return sorted(near - {me})


def _members(pipeline: Pipeline) -> Iterator[Member]:
    for stage in pipeline.stages:
        yield from stage.ranks
        yield from stage.replicas
    if pipeline.move is not None:
        yield pipeline.move.to
