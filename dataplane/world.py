"""What a node knows of its cluster: etcd's keys, parsed once into immutable values."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TypeVar

from controlplane.contract import keys
from controlplane.contract.errors import PeerError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys
from controlplane.contract.records import ControllerRecord, NodeRecord
from controlplane.contract.topology import Pipeline, Topology
from controlplane.etcd.values import KeyValue, WatchBatch, fold

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class World:
    """Folds watch batches. A value that does not parse is logged, counted, and taken for absent."""

    names: Keys
    group: str
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    controllers: dict[str, ControllerRecord] = field(default_factory=dict)
    topology: Topology | None = None
    junk: int = 0
    _items: dict[str, KeyValue] = field(default_factory=dict)

    def apply(self, batch: WatchBatch) -> None:
        self._items = fold(self._items, batch)
        self.nodes = {
            record.member.node: record
            for record in self._under(self.names.nodes, NodeRecord)
            if record.group == self.group
        }
        self.controllers = {r.id: r for r in self._under(self.names.controllers, ControllerRecord)}
        item = self._items.get(self.names.topology(self.group))
        topology = self._parse(item, Topology) if item is not None else None
        # A topology that goes back in time (etcd restored from a backup) is not believed.
        if topology is not None and (self.topology is None or topology.counter > self.topology.counter):
            self.topology = topology

    def _under(self, prefix: str, kind: type[T]) -> list[T]:
        parsed = (self._parse(item, kind) for key, item in self._items.items() if key.startswith(prefix))
        return [value for value in parsed if value is not None]

    def _parse(self, item: KeyValue, kind: type[T]) -> T | None:
        try:
            return keys.decode(item.value, kind, item.key)
        except PeerError as error:
            self.junk += 1
            log.warning("%s", error)
            return None


def neighbours(topology: Topology, me: Member) -> set[Member]:
    """The members whose silence we would notice: those that exchange steps or copies with us."""
    found: set[Member] = set()
    for pipeline in topology.pipelines:
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


def pipelines_of(topology: Topology, me: Member) -> list[Pipeline]:
    """Those in which we serve, hold a copy, or are about to serve."""
    return [
        p
        for p in topology.pipelines
        if any(me in stage.ranks or me in stage.replicas for stage in p.stages)
        or (p.move is not None and p.move.to == me)
    ]
