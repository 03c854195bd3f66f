"""What the gateway learns from etcd: the topology, and where the nodes are. It serves on when etcd is away."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

import structlog

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import PeerError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, decode
from controlplane.contract.records import NodeRecord
from controlplane.contract.topology import Topology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.watch import Watch
from web.gateway.dispatch import Dispatcher
from web.gateway.events import TopologySeen

log = structlog.get_logger()


class ClusterWatch:
    """Two watches: one key for the topology, one prefix for the nodes. Junk is logged and left out."""

    def __init__(
        self, client: EtcdClient, config: ClusterConfig, dispatcher: Dispatcher, me: Member | None = None
    ) -> None:
        self._me = me
        self._client = client
        keys = Keys(config.cluster)
        self.junk = 0
        self._topology_key = keys.topology(config.group)
        self._dispatcher = dispatcher
        self._topology: Watch = client.watch_prefix(self._topology_key)
        self._nodes: Watch = client.watch_prefix(keys.nodes)

    def age_s(self) -> float:
        """Seconds since etcd was last heard: how old the topology may be."""
        return self._topology.age_s()

    def troubles(self) -> Sequence[str]:
        """Why nothing would be repaired, beyond etcd being away."""
        return self._client.health.troubles()

    async def follow_topology(self) -> None:
        """Until cancelled."""
        await self._follow(self._topology, self._take_topology)

    async def follow_nodes(self) -> None:
        """Until cancelled."""
        await self._follow(self._nodes, self._take_node)

    async def _follow(self, watch: Watch, take: Callable[[str, bytes], None]) -> None:
        async for batch in watch:
            for event in batch.events:
                # A key that is gone changes nothing here: a lost lease does not move a node's front door,
                # and only a newer topology says who serves.
                if event.now is None:
                    continue
                try:
                    take(event.key, event.now.value)
                except PeerError as error:
                    self.junk += 1
                    log.warning("junk in etcd", error=str(error))

    def _take_topology(self, key: str, value: bytes) -> None:
        if key != self._topology_key:
            return
        topology = decode(value, Topology, key)
        self._dispatcher.feed(TopologySeen(topology))
        members = {member for pipeline in topology.pipelines for member in pipeline.members()}
        self._dispatcher.links.prune(members)
        if self._me is not None and self._me in topology.retired:
            log.info("retired", topology=topology.counter)
            self._me = None
            signal.raise_signal(signal.SIGTERM)  # the same goodbye, whoever asks for it

    def _take_node(self, key: str, value: bytes) -> None:
        record = decode(value, NodeRecord, key)
        member: Member = record.member
        self._dispatcher.locate(member, record.rpc_address)
