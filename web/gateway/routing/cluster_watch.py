"""What the gateway learns from etcd: the topology, and where the nodes are. It serves on when etcd is away."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import structlog

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys
from controlplane.contract.records import NodeRecord
from controlplane.contract.topology import Topology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.register import Registration
from controlplane.etcd.watch import Watch
from controlplane.keyspace.view import Change, View
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.routing.events import TopologySeen
from web.gateway.routing.served_context import ServedContext

log = structlog.get_logger()


class ClusterWatch:
    """One watch on the cluster's keys. `presence`: this gateway's own name, `me`: its own process."""

    def __init__(
        self,
        client: EtcdClient,
        config: ClusterConfig,
        dispatcher: Dispatcher,
        me: Member | None = None,
        presence: Registration | None = None,
        context: ServedContext | None = None,
    ) -> None:
        keys = Keys.of(config)
        self.view = View(keys, config.group)
        self._me = me
        self._presence = presence
        self._context = context
        self._said = 0  # topology that etcd was told of
        self._client = client
        self._dispatcher = dispatcher
        self._watch: Watch = client.watch_prefix(keys.root)

    @property
    def junk(self) -> int:
        return self.view.junk

    def age_s(self) -> float:
        """Seconds since etcd was last heard: how old the topology may be."""
        return self._watch.age_s()

    def controllers(self) -> dict[str, str]:
        """gRPC address of each that is registered, by its name."""
        return {name: record.rpc_address for name, record in self.view.controllers.items()}

    def troubles(self) -> Sequence[str]:
        """Why nothing would be repaired, beyond etcd being away."""
        return self._client.health.troubles()

    async def follow(self) -> None:
        """Until cancelled."""
        if self._presence is not None:  # a process whose name is somebody else's serves nobody
            await self._presence.free.wait()
        async for batch in self._watch:
            for change in self.view.apply(batch):
                self._take(change)
            if self._presence is not None:
                self._presence.saw(self.view.item(self._presence.key), batch.revision)
            if self._me is not None and self.view.retired(self._me):
                log.info("retired", topology=self.view.topology and self.view.topology.counter)
                self._me = None
                signal.raise_signal(signal.SIGTERM)  # the same goodbye, whoever asks for it

    def _say_newer(self, topology: Topology) -> None:
        """etcd may have been restored from a snapshot, and nobody else may live who knows what came after it."""
        known = self._dispatcher.router.topology
        if (
            known is not None
            and known.counter > max(topology.counter, self._said)
            and self._presence is not None
        ):
            self._said = known.counter
            self._presence.amend(topology_counter=known.counter)

    def _take(self, change: Change) -> None:
        # A key that is gone changes nothing here: a lost lease does not move a node's front door, and only a newer
        # topology says who serves.
        match change.now:
            case NodeRecord():
                self._dispatcher.locate(change.now.member, change.now.rpc_address)
                if self._context is not None and change.now.group == self.view.group:
                    node = change.now
                    self._context.registered(node.member.node, node.context_len, node.grammars, node.sampling)
            case Topology():
                self._dispatcher.feed(TopologySeen(change.now))
                self._say_newer(change.now)
                members = {member for pipeline in change.now.pipelines for member in pipeline.members()}
                self._dispatcher.links.prune(members)
                if self._context is not None:
                    self._context.keep(self.view.nodes.keys() | {member.node for member in members})
            case _:
                pass
