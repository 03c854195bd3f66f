"""One watch on everything that the cluster keeps in etcd, turned into events and a view for the status page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, printable
from controlplane.contract.records import ControllerRecord, GatewayRecord, NodeRecord, Operation
from controlplane.contract.schema import SCHEMA
from controlplane.contract.topology import Topology
from controlplane.core.events import (
    NodeGone,
    NodeRegistered,
    OperationGone,
    OperationSeen,
    OperationUnknown,
    PeersSeen,
    TopologySeen,
)
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.register import Registration
from controlplane.etcd.values import WatchBatch
from controlplane.etcd.watch import Watch
from controlplane.keyspace.view import Change, View
from controlplane.shell.inbox import Inbox

log = structlog.get_logger()


class Registry:
    """What etcd says, and whether this controller may lead by it. `presence`: this process's own name."""

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        group: str,
        inbox: Inbox,
        me: Member | None = None,
        presence: Registration | None = None,
    ) -> None:
        self.view = View(keys, group)
        self.synced = asyncio.Event()  # the first snapshot is in the inbox
        self.retired = asyncio.Event()  # this very process has to make way for a fresh one
        # Why this controller must not lead: what it would rewrite is newer, or cannot be read.
        self.obstacle = ""
        self.blocked = asyncio.Event()  # while there is an obstacle
        self.free = asyncio.Event()  # while there is none
        self._me = me
        self._presence = presence
        self._peers = PeersSeen()
        self._client = client
        self._inbox = inbox
        self._nodes: set[str] = set()
        self._watch: Watch | None = None

    @property
    def controllers(self) -> Mapping[str, ControllerRecord]:
        return self.view.controllers

    @property
    def gateways(self) -> Mapping[str, GatewayRecord]:
        return self.view.gateways

    @property
    def operations(self) -> Mapping[str, tuple[Operation, int]]:
        return self.view.operations

    @property
    def leader(self) -> str:
        """The controller that leads, "" while none does."""
        return next(iter(self.view.candidates()), "")

    @property
    def junk_values(self) -> int:
        return self.view.junk

    async def may_lead(self) -> None:
        """Wait until this process has its name, and nothing forbids it to lead."""
        if self._presence is not None:
            await self._presence.held.wait()
        await self.free.wait()

    def etcd_age_s(self) -> float:
        """Seconds since etcd was last heard."""
        return self._watch.age_s() if self._watch else 0.0

    def troubles(self) -> list[str]:
        return self.view.troubles()

    async def run(self) -> None:
        """Follow etcd until cancelled."""
        self._watch = self._client.watch_prefix(self.view.keys.root)
        try:
            async for batch in self._watch:
                await self._apply(batch)
                self.synced.set()
        finally:
            await self._watch.aclose()

    async def _apply(self, batch: WatchBatch) -> None:
        changes = self.view.apply(batch)
        if self._presence is not None:
            self._presence.saw(self.view.item(self._presence.key), batch.revision)
        self._find_obstacle()  # before anything is decided on what is told below
        for change in changes:
            await self._tell(change)
        if (peers := self._peers_now()) != self._peers:
            self._peers = peers
            await self._inbox.put_watched(peers)
        if self._me is not None and self.view.retired(self._me):
            self.retired.set()
        if not self.synced.is_set() and self.view.item(self.view.keys.topology(self.view.group)) is None:
            await self._inbox.put_watched(TopologySeen(None, 0))

    async def _tell(self, change: Change) -> None:
        match change.now:
            case NodeRecord():
                self._nodes.add(change.name)
                await self._inbox.put_watched(NodeRegistered(change.now))
            case Operation():
                await self._inbox.put_watched(OperationSeen(change.now, change.mod_revision))
            case Topology():
                await self._inbox.put_watched(TopologySeen(change.now, change.mod_revision))
            case None:
                await self._tell_absent(change)
            case _:
                pass  # a controller or a gateway: `PeersSeen` tells of all of them

    async def _tell_absent(self, change: Change) -> None:
        """A key that is gone; or that cannot be read, which only concerns who would act on its absence."""
        match change.folder:
            case "nodes" if not change.unreadable and change.name in self._nodes:
                self._nodes.discard(change.name)
                await self._inbox.put_watched(NodeGone(change.name))
            case "operations" if change.unreadable:
                await self._inbox.put_watched(OperationUnknown(change.name))
            case "operations":
                await self._inbox.put_watched(OperationGone(change.name))
            case "groups" if not change.unreadable:
                await self._inbox.put_watched(TopologySeen(None, 0))
            case _:
                pass

    def _find_obstacle(self) -> None:
        view, topology = self.view, self.view.keys.topology(self.view.group)
        newer = [k for k in view.newer if k == topology or k.startswith(view.keys.operations)]
        why = ""
        if newer:
            schema = max(view.newer[key] for key in newer)
            key = printable(newer[0])
            why = f"{key} was written by newer code (schema {schema}, this is {SCHEMA}): that has to lead"
        elif topology in view.unreadable:
            why = (
                f"{topology} cannot be read ({view.unreadable[topology]}): write the right value back, or delete the "
                "key and the last good one is written again"
            )
        if why and why != self.obstacle:
            log.warning("this controller does not lead", why=why)
        self.obstacle = why
        (self.blocked.set if why else self.blocked.clear)()
        (self.free.clear if why else self.free.set)()

    def _peers_now(self) -> PeersSeen:
        controllers = [(r.id, r.version, r.settings) for r in self.controllers.values()]
        gateways = [(r.id, r.version, r.settings) for r in self.gateways.values()]
        return PeersSeen(
            controllers=tuple(Member(r.id, r.incarnation) for _, r in sorted(self.controllers.items())),
            gateways=tuple(Member(r.id, r.incarnation) for _, r in sorted(self.gateways.items())),
            candidates=tuple(name for name in self.view.candidates() if name),
            hears=tuple(sorted((name, hearing.nodes) for name, hearing in self.view.hearing.items())),
            forgotten=self.view.forgotten,
            made_of=tuple(sorted(controllers + gateways)),
        )
