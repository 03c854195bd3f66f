"""What a node knows of its cluster: the keyspace's view, and the newest topology that it has reason to believe."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.contract.keys import Keys
from controlplane.contract.records import ControllerRecord, NodeRecord
from controlplane.contract.topology import Topology
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
