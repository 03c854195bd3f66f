"""One watch on everything that the cluster keeps in etcd, turned into events and a view for the status page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TypeVar

import structlog

from controlplane.contract.errors import PeerError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, decode
from controlplane.contract.records import ControllerRecord, GatewayRecord, NodeRecord, Operation
from controlplane.contract.topology import Topology
from controlplane.core.events import (
    NodeGone,
    NodeRegistered,
    OperationGone,
    OperationSeen,
    PeersSeen,
    TopologySeen,
)
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import leader_of
from controlplane.etcd.values import KeyValue, WatchBatch, WatchEvent
from controlplane.etcd.watch import Watch
from controlplane.shell.inbox import Inbox

log = structlog.get_logger()

T = TypeVar("T")

# A snapshot is told in this order: who is there, what is wanted, and last what is, so that the core never
# plans for a topology whose nodes it has not been told of.
_ORDER = ("nodes", "operations", "groups")


class Registry:
    """What etcd says. Values that cannot be read are logged and counted, and never stop anything."""

    def __init__(
        self, client: EtcdClient, keys: Keys, group: str, inbox: Inbox, me: Member | None = None
    ) -> None:
        self.controllers: dict[str, ControllerRecord] = {}
        self.gateways: dict[str, GatewayRecord] = {}
        self.operations: dict[str, tuple[Operation, int]] = {}  # with their mod_revisions
        self.leader = ""  # the controller that leads, "" while none does
        self.junk_values = 0
        self.synced = asyncio.Event()  # the first snapshot is in the inbox
        self.retired = asyncio.Event()  # this very process has to make way for a fresh one
        self._me = me
        self._peers = PeersSeen()
        self._client = client
        self._keys = keys
        self._group = group
        self._inbox = inbox
        self._items: dict[str, KeyValue] = {}
        self._nodes: set[str] = set()
        self._topology: Topology | None = None
        self._watch: Watch | None = None

    def etcd_age_s(self) -> float:
        """Seconds since etcd was last heard."""
        return self._watch.age_s() if self._watch else 0.0

    async def run(self) -> None:
        """Follow etcd until cancelled."""
        self._watch = self._client.watch_prefix(self._keys.root)
        try:
            async for batch in self._watch:
                await self._apply(batch)
                self.synced.set()
        finally:
            await self._watch.aclose()

    async def _apply(self, batch: WatchBatch) -> None:
        for event in _ordered(batch, self._items, self._keys.root):
            if event.now is None:
                self._items.pop(event.key, None)
            else:
                self._items[event.key] = event.now
            await self._tell(event)
        if (peers := self._peers_now()) != self._peers:
            self._peers = peers
            await self._inbox.put(peers)
        if not self.synced.is_set() and self._keys.topology(self._group) not in self._items:
            await self._inbox.put(TopologySeen(None, 0))

    async def _tell(self, event: WatchEvent) -> None:
        folder, _, name = event.key.removeprefix(self._keys.root).partition("/")
        match folder:
            case "nodes":
                await self._tell_node(name, event)
            case "operations":
                await self._tell_operation(name, event)
            case "groups" if event.key == self._keys.topology(self._group):
                await self._tell_topology(event)
            case "controllers":
                self._keep(self.controllers, name, self._parse(event, ControllerRecord))
            case "gateways":
                self._keep(self.gateways, name, self._parse(event, GatewayRecord))
            case "leader":
                self._find_leader()
            case _:
                pass  # another group's topology, or something that an operator keeps here

    async def _tell_node(self, name: str, event: WatchEvent) -> None:
        record = self._parse(event, NodeRecord)
        if record is not None and record.member.node != name:
            self._junk(event.key, f"it speaks of node {record.member.node}")
            record = None
        if record is not None and record.group == self._group:
            self._nodes.add(name)
            await self._inbox.put(NodeRegistered(record))
        elif name in self._nodes:
            self._nodes.discard(name)
            await self._inbox.put(NodeGone(name))

    async def _tell_operation(self, name: str, event: WatchEvent) -> None:
        operation = self._parse(event, Operation)
        if operation is not None and operation.id != name:
            self._junk(event.key, f"it speaks of operation {operation.id}")
            operation = None
        if operation is not None:
            self.operations[name] = (operation, event.mod_revision)
            await self._inbox.put(OperationSeen(operation, event.mod_revision))
        elif self.operations.pop(name, None) is not None:
            await self._inbox.put(OperationGone(name))

    async def _tell_topology(self, event: WatchEvent) -> None:
        if event.now is None:
            self._topology = None
            await self._inbox.put(TopologySeen(None, 0))
            return
        # A value that cannot be read keeps the last good one, under the new revision: so that the leader's
        # next write replaces it instead of failing for ever.
        self._topology = self._parse(event, Topology) or self._topology
        if self._topology is not None:
            await self._inbox.put(TopologySeen(self._topology, event.mod_revision))
            if self._me in self._topology.retired:
                self.retired.set()

    def _find_leader(self) -> None:
        candidates = {k: v for k, v in self._items.items() if k.startswith(self._keys.leader)}
        leader = leader_of(candidates)
        try:
            self.leader = decode(leader.identity, ControllerRecord, leader.key).id if leader else ""
        except PeerError as error:
            self._junk(self._keys.leader, str(error))
            self.leader = ""

    def _peers_now(self) -> PeersSeen:
        standing = [item for key, item in self._items.items() if key.startswith(self._keys.leader)]
        candidates = []
        for item in sorted(standing, key=lambda item: item.create_revision):
            with contextlib.suppress(PeerError):  # told when it was found
                candidates.append(decode(item.value, ControllerRecord, item.key).id)
        return PeersSeen(
            controllers=tuple(Member(r.id, r.incarnation) for _, r in sorted(self.controllers.items())),
            gateways=tuple(Member(r.id, r.incarnation) for _, r in sorted(self.gateways.items())),
            candidates=tuple(candidates),
        )

    def _parse(self, event: WatchEvent, kind: type[T]) -> T | None:
        if event.now is None:
            return None
        try:
            return decode(event.now.value, kind, event.key)
        except PeerError as error:
            self._junk(event.key, str(error))
            return None

    def _junk(self, key: str, why: str) -> None:
        self.junk_values += 1
        log.warning("a value in etcd is ignored", key=key, why=why)

    @staticmethod
    def _keep(kept: dict[str, T], name: str, record: T | None) -> None:
        if record is None:
            kept.pop(name, None)
        else:
            kept[name] = record


def _ordered(batch: WatchBatch, known: Mapping[str, KeyValue], root: str) -> list[WatchEvent]:
    """The batch's changes; for a snapshot, also of what it no longer has, and without what we know."""
    if not batch.is_snapshot:
        return list(batch.events)
    present = {event.key for event in batch.events}
    gone = [WatchEvent(key, batch.revision, None) for key in known if key not in present]
    changed = [
        event
        for event in batch.events
        if event.key not in known or known[event.key].mod_revision != event.mod_revision
    ]

    def place(event: WatchEvent) -> int:
        folder = event.key.removeprefix(root).partition("/")[0]
        return _ORDER.index(folder) if folder in _ORDER else -1

    return gone + sorted(changed, key=place)
