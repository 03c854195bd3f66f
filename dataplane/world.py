"""What a node knows of its cluster: the keyspace's view, and the newest topology that it has reason to believe."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys
from controlplane.contract.records import ControllerRecord, NodeRecord
from controlplane.contract.topology import Pipeline, Topology
from controlplane.etcd.values import WatchBatch
from controlplane.keyspace.view import Change, View


@dataclass(slots=True)
class World:
    names: Keys
    group: str
    topology: Topology | None = None
    view: View = field(init=False)

    def __post_init__(self) -> None:
        self.view = View(self.names, self.group)

    @property
    def nodes(self) -> dict[str, NodeRecord]:
        return self.view.nodes

    @property
    def controllers(self) -> dict[str, ControllerRecord]:
        return self.view.controllers

    def apply(self, batch: WatchBatch) -> list[Change]:
        """Take a batch in; what it changed."""
        changes = self.view.apply(batch)
        topology = self.view.topology
        # A topology that goes back in time (etcd restored from a backup) is not believed.
        if topology is not None and (self.topology is None or topology.counter > self.topology.counter):
            self.topology = topology
        return changes


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
