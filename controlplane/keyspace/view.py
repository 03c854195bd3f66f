"""The cluster's keys, folded from a watch into values: one policy for what cannot be read, one for who is retired.

A value that cannot be read is told once (log, `junk`, `unreadable`) and is *unknown*: the last good value of its key is
kept for as long as the key is there, and a key that never had one is not taken for absent. So is one that cannot be,
though it can be read (possible.py), and one that does not say clearly which schema it was written in. `newer` are the
keys that newer code has written, readable or not: whoever would rewrite them must not lead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import structlog

from controlplane.contract import schema
from controlplane.contract.errors import PeerError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, decode, printable
from controlplane.contract.records import (
    ControllerRecord,
    GatewayRecord,
    Hearing,
    NodeRecord,
    Operation,
    Waiting,
)
from controlplane.contract.revocations import Revocation
from controlplane.contract.topology import Topology
from controlplane.etcd.values import KeyValue, WatchBatch, WatchEvent
from controlplane.keyspace import possible

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

# A snapshot is told in this order: who is there, what is wanted, and last what is, so that nobody plans for, or acts
# on, a topology whose nodes it has not been told of.
ORDER = (
    "revoked",
    "controllers",
    "hearing",
    "waiting",
    "gateways",
    "leader",
    "nodes",
    "operations",
    "groups",
)
KINDS: dict[str, type[msgspec.Struct]] = {
    "revoked": Revocation,
    "nodes": NodeRecord,
    "controllers": ControllerRecord,
    "hearing": Hearing,
    "waiting": Waiting,
    "gateways": GatewayRecord,
    "leader": ControllerRecord,
    "operations": Operation,
    "groups": Topology,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change. `now` None: it is gone, or, with `unreadable`, it is there and nothing of it can be read.
    `name` can be logged and sent, whatever the key has in it."""

    folder: str
    name: str
    now: msgspec.Struct | None
    mod_revision: int
    unreadable: str = ""


@dataclass(slots=True)
class View:
    """`apply` takes a batch in and says what changed. Costs per change, not per key."""

    keys: Keys
    group: str
    nodes: dict[str, NodeRecord] = field(default_factory=dict)  # of this group
    controllers: dict[str, ControllerRecord] = field(default_factory=dict)
    hearing: dict[str, Hearing] = field(default_factory=dict)  # by controller
    waiting: dict[str, Waiting] = field(default_factory=dict)  # by the key whose name is taken: "nodes/n2"
    gateways: dict[str, GatewayRecord] = field(default_factory=dict)
    operations: dict[str, tuple[Operation, int]] = field(default_factory=dict)  # with their mod_revisions
    revoked: dict[str, Revocation] = field(default_factory=dict)  # by the id of what is good no more
    topology: Topology | None = None  # the newest that can be read; kept when its key is deleted
    unreadable: dict[str, str] = field(default_factory=dict)  # key -> why
    newer: dict[str, int] = field(default_factory=dict)  # key -> schema
    junk: int = 0  # values that could not be read, ever
    _items: dict[str, KeyValue] = field(default_factory=dict)
    # What is written here, by key.
    _ours: dict[str, tuple[bytes, msgspec.Struct]] = field(default_factory=dict)
    _leading: dict[str, tuple[int, str]] = field(default_factory=dict)  # key -> create revision, controller

    def apply(self, batch: WatchBatch) -> list[Change]:
        """The changes that this batch brings, in order; of a snapshot only what is not known yet."""
        changes = []
        for event in self._ordered(batch):
            if event.now is None:
                self._items.pop(event.key, None)
            else:
                self._items[event.key] = event.now
            change = self._take(event)
            if change is not None:
                changes.append(change)
        return changes

    def parse(self, key: str, value: bytes, kind: type[T], written_in: int | None = None) -> T:
        """What stands at a key, for whoever reads it by itself. Raises PeerError, also for what cannot be."""
        found, (_, name) = decode(value, kind, key), self._place(key)
        why = possible.fault(found, name)
        if not why and not (schema.schema_of(value) if written_in is None else written_in):
            why = "it does not say which schema it was written in"
        if why:
            raise PeerError(f"etcd key {printable(key)}: {why}")
        return found

    def item(self, key: str) -> KeyValue | None:
        """A key as etcd has it, readable or not."""
        return self._items.get(key)

    def writes(self, key: str, encoded: bytes, value: msgspec.Struct) -> None:
        """What this process writes need not be decoded when it comes back: that costs as much as to decide upon it."""
        self._ours[key] = (encoded, value)

    def candidates(self) -> list[str]:
        """Controllers in the order in which they would lead, the leader first."""
        return [name for _, name in sorted(self._leading.values())]

    def retired(self, me: Member) -> bool:
        """Whether a process has to make way for a fresh one of its name."""
        return self.topology is not None and me in self.topology.retired

    @property
    def forgotten(self) -> int:
        """Counter of a topology that a controller or a gateway knows and etcd has no longer; 0: there is none."""
        newest = max((h.topology_counter for h in self.hearing.values()), default=0)
        newest = max((g.topology_counter for g in self.gateways.values()), default=newest)
        return newest if self.topology is None or newest > self.topology.counter else 0

    def troubles(self) -> list[str]:
        """What in etcd cannot be read, or only by newer code, and names that two processes want, in words."""
        told = [
            f"etcd key {printable(key)} cannot be read ({why}): it is left as it is"
            for key, why in self.unreadable.items()
        ]
        for key, written_in in self.newer.items():
            if key not in self.unreadable:
                told.append(f"etcd key {printable(key)} was written by newer code (schema {written_in})")
        for name, wait in sorted(self.waiting.items()):
            told.append(
                f"{name} belongs to one process ({wait.who}) and another one wants it ({wait.by}): "
                "stop one of them, or give it another name"
            )
        return told

    def _take(self, event: WatchEvent) -> Change | None:
        folder, name = self._place(event.key)
        if folder not in KINDS or (folder == "groups" and event.key != self.keys.topology(self.group)):
            return None  # another group's topology, or something that an operator keeps here
        if event.now is None:
            self._ours.pop(event.key, None)
            self.unreadable.pop(event.key, None)
            self.newer.pop(event.key, None)
            self._forget(folder, name, event.key)
            return Change(folder, name, None, event.mod_revision)
        value = self._read(folder, event.now)
        if value is None:
            return Change(folder, name, None, event.mod_revision, self.unreadable[event.key])
        return self._keep(folder, name, value, event)

    def _place(self, key: str) -> tuple[str, str]:
        """A key's folder, and its name there."""
        folder, _, name = key.removeprefix(self.keys.root).partition("/")
        return folder, printable(name)

    def _read(self, folder: str, item: KeyValue) -> msgspec.Struct | None:
        encoded, ours = self._ours.get(item.key, (b"", None))
        if ours is not None and encoded == item.value:
            self.newer.pop(item.key, None)
            self.unreadable.pop(item.key, None)
            return ours
        written_in = schema.schema_of(item.value)
        if written_in > schema.SCHEMA:
            self.newer[item.key] = written_in
        else:
            self.newer.pop(item.key, None)
        try:
            value = self.parse(item.key, item.value, KINDS[folder], written_in)
        except PeerError as error:
            key = printable(item.key)
            self.junk += 1
            self.unreadable[item.key] = str(error).removeprefix(f"etcd key {key}: ")
            log.warning("junk in etcd", key=key, error=str(error))
            if folder == "leader":  # somebody leads, whoever it is
                self._leading[item.key] = (item.create_revision, "")
            return None
        self.unreadable.pop(item.key, None)
        return value

    def _keep(self, folder: str, name: str, value: msgspec.Struct, event: WatchEvent) -> Change | None:
        match value:
            case NodeRecord():
                if value.group != self.group:  # it may have been one of ours before
                    return (
                        Change(folder, name, None, event.mod_revision) if self.nodes.pop(name, None) else None
                    )
                self.nodes[name] = value
            case ControllerRecord() if folder == "leader":
                assert event.now is not None
                self._leading[event.key] = (event.now.create_revision, value.id)
            case ControllerRecord():
                self.controllers[name] = value
            case Hearing():
                self.hearing[name] = value
            case Waiting():
                self.waiting[name] = value
            case GatewayRecord():
                self.gateways[name] = value
            case Revocation():
                self.revoked[name] = value
            case Operation():
                self.operations[name] = (value, event.mod_revision)
            case Topology():
                self.topology = value
        return Change(folder, name, value, event.mod_revision)

    def _forget(self, folder: str, name: str, key: str) -> None:
        match folder:
            case "nodes":
                self.nodes.pop(name, None)
            case "controllers":
                self.controllers.pop(name, None)
            case "hearing":
                self.hearing.pop(name, None)
            case "waiting":
                self.waiting.pop(name, None)
            case "gateways":
                self.gateways.pop(name, None)
            case "revoked":
                self.revoked.pop(name, None)
            case "operations":
                self.operations.pop(name, None)
            case "leader":
                self._leading.pop(key, None)

    def _ordered(self, batch: WatchBatch) -> Iterable[WatchEvent]:
        """The batch's changes; for a snapshot, also of what it no longer has, and without what is known."""
        if not batch.is_snapshot:
            return batch.events
        present = {event.key for event in batch.events}
        gone = [WatchEvent(key, batch.revision, None) for key in self._items if key not in present]
        changed = [event for event in batch.events if _differs(self._items, event)]
        return gone + sorted(changed, key=lambda event: self._order(event.key))

    def _order(self, key: str) -> int:
        folder, _ = self._place(key)
        return ORDER.index(folder) if folder in ORDER else -1


def _differs(known: Mapping[str, KeyValue], event: WatchEvent) -> bool:
    return event.key not in known or known[event.key].mod_revision != event.mod_revision
