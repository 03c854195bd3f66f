"""Performs the core's effects, one after the other, in the order in which the core gave them.

On its own task, because etcd may take a second to fail: the core has to hear heartbeats and ticks meanwhile,
or it would take its own silence for everybody's.
"""

from __future__ import annotations

import asyncio
import time
from typing import assert_never

import structlog

from controlplane.backoff import Backoff
from controlplane.contract.audit import Action
from controlplane.contract.errors import PeerError
from controlplane.contract.events import Event, EventKind
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import Operation
from controlplane.contract.topology import Topology
from controlplane.core.events import (
    Effect,
    ForgetOperation,
    OperationGone,
    OperationSeen,
    OperationUnknown,
    Record,
    Reread,
    Resign,
    TopologySeen,
    Write,
    WriteConflict,
    WriteDone,
    WriteOperation,
    WriteTopology,
    WriteUnknown,
)
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Leadership
from controlplane.etcd.errors import EtcdError, EtcdUnknown
from controlplane.etcd.values import Compare, Delete, Put
from controlplane.history.store import Audit, submitted
from controlplane.history.writer import HistoryWriter
from controlplane.keyspace.view import View
from controlplane.shell.exposition import Buckets
from controlplane.shell.inbox import Inbox

log = structlog.get_logger()

QUEUE_LEN_MAX = 1024
CALL_LIMIT_S = 1.0
# Paces the core while etcd refuses or is away: each of its attempts takes at least so long.
FAILURE_PAUSE_S = 0.2
FAILURE_PAUSE_S_MAX = 1.0
# Buckets of the phases of a failover, in seconds.
PHASE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Which details of which events are phases, and their names: those of an incident.
PHASES = {
    EventKind.DIED: {"silent_s": "detect"},
    EventKind.EPOCH: {"plan_s": "plan"},
    EventKind.RECOVERED: {"connect_s": "connect", "restore_s": "restore", "first_token_s": "first_token"},
}


class Performer:
    """`leadership` is set by whoever campaigns; every write carries its guard."""

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        group: str,
        inbox: Inbox,
        history: HistoryWriter,
        view: View | None = None,
    ) -> None:
        self.leadership: Leadership | None = None
        self.writes = {"done": 0, "conflict": 0, "unknown": 0}
        self.failover_s: dict[str, Buckets] = {}  # phases of failures, by name
        self.switch_s: dict[str, Buckets] = {}  # of planned moves
        self._client = client
        self._keys = keys
        self._group = group
        self._inbox = inbox
        self._history = history
        self._view = view or View(keys, group)
        # What was last written here, which no watch may show yet.
        self._written: dict[str, tuple[int, bytes]] = {}
        # What this code has made in the same way, so that it has no field that only newer code knows.
        self._plain: dict[str, bytes] = {}
        self._begun: set[str] = set()  # open operations of which the audit was told that they began
        self._backoff = Backoff(FAILURE_PAUSE_S, FAILURE_PAUSE_S_MAX)
        self._last_error = ""
        self._queue: asyncio.Queue[Effect] = asyncio.Queue(QUEUE_LEN_MAX)

    async def put(self, effect: Effect) -> None:
        """Waits only when `QUEUE_LEN_MAX` effects are waiting; each of them ends within about a second."""
        await self._queue.put(effect)

    async def run(self) -> None:
        while True:
            await self._perform(await self._queue.get())

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case WriteTopology(topology):
                await self._write(effect, self._keys.topology(self._group), topology)
            case WriteOperation(operation):
                key = self._keys.operation(operation.id)
                if not await self._write(effect, key, operation):
                    return
                self._audit_begun(operation)
                if not operation.open:
                    written = self._view.topology
                    epoch = 0 if written is None else written.counter
                    self._history.put(Audit(Action(operation.state.value), operation, time.time(), epoch))
            case ForgetOperation(operation_id):
                self._begun.discard(operation_id)
                await self._forget(self._keys.operation(operation_id))
            case Reread(None):
                await self._reread_topology()
            case Reread(str() as operation_id):
                await self._reread_operation(operation_id)
            case Resign(why):
                if self.leadership is not None:  # else it is lost already, and the core will hear of it
                    self.leadership.give_up(why)
            case Record(event):
                self._count_phases(event)
                self._history.put(event)
            case Reread():
                raise AssertionError("an operation's id is a string or None")
            case _:
                assert_never(effect)

    def _audit_begun(self, operation: Operation) -> None:
        """Whoever accepted it may have ended before it could say so, or may not know that etcd took it."""
        # Some may have ended under another leader.
        self._begun &= self._view.operations.keys() | {operation.id}
        line = submitted(operation)
        if line is not None and operation.id not in self._begun:
            self._history.put(line)
            self._begun.add(operation.id)
        if not operation.open:
            self._begun.discard(operation.id)

    async def _write(self, write: Write, key: str, value: Topology | Operation) -> bool:
        """One guarded compare-and-swap, answered by exactly one event; whether it was done."""
        leadership = self.leadership
        if leadership is None or not leadership.valid():
            self._answer("conflict", WriteConflict(write))
            return False
        compares = [leadership.guard(), Compare.mod_revision(key, write.expected_mod_revision)]
        try:
            encoded = self._encode(key, value, await self._before(key, write.expected_mod_revision))
            self._view.writes(key, encoded, value)
            result = await self._client.txn(compares, [Put(key, encoded)], timeout_s=CALL_LIMIT_S)
        except EtcdUnknown as error:
            self._note("a write's outcome is unknown", key, error)
            self._answer("unknown", WriteUnknown(write))
            return False
        except (EtcdError, PeerError) as error:
            self._note("a write was not taken", key, error)
            await self._backoff.pause()
            self._answer("conflict", WriteConflict(write))
            return False
        self._recovered()
        if result.succeeded:
            self._written[key] = (result.revision, encoded)
            self._answer("done", WriteDone(write, result.revision))
        else:
            self._answer("conflict", WriteConflict(write))
        return result.succeeded

    def _encode(self, key: str, value: Topology | Operation, before: bytes | None) -> bytes:
        """To look for unknown fields in what a write replaces costs five times as much as to encode what it writes."""
        encoded = encode(value)
        if before is not None and before != self._plain.get(key):
            kept = encode(value, before)
            if kept != encoded:
                self._plain.pop(key, None)
                return kept
        self._plain[key] = encoded
        return encoded

    async def _before(self, key: str, mod_revision: int) -> bytes | None:
        """What a write replaces: fields that only newer code knows are kept. None: nothing, or no longer that."""
        written_at, written = self._written.get(key, (0, b""))
        if written and mod_revision in (written_at, 0):  # 0: it was deleted by hand, and is written again
            return written
        item = self._view.item(key)
        if item is None or item.mod_revision != mod_revision:
            item = await self._client.get(key, timeout_s=CALL_LIMIT_S) if mod_revision else None
        return item.value if item is not None and item.mod_revision == mod_revision else None

    async def _forget(self, key: str) -> None:
        if self.leadership is None or not self.leadership.valid():
            return
        if key in self._view.unreadable or key in self._view.newer:
            return  # not what the core takes it for
        self._written.pop(key, None)
        self._plain.pop(key, None)
        try:
            await self._client.txn([self.leadership.guard()], [Delete(key)], timeout_s=CALL_LIMIT_S)
        except EtcdError as error:
            log.warning("an old operation stays in etcd", key=key, error=str(error))

    def _note(self, what: str, key: str, error: Exception) -> None:
        if str(error) != self._last_error:  # once per cause: the core tries again until it is mended
            log.warning(what, key=key, error=str(error))
        self._last_error = str(error)

    def _recovered(self) -> None:
        self._backoff.succeeded()
        self._last_error = ""

    def _answer(self, outcome: str, event: WriteDone | WriteConflict | WriteUnknown) -> None:
        self.writes[outcome] += 1
        self._inbox.put_own(event)

    async def _reread_topology(self) -> None:
        key = self._keys.topology(self._group)
        try:
            found = await self._client.get(key, timeout_s=CALL_LIMIT_S)
            topology = self._view.parse(key, found.value, Topology) if found else None
        except (EtcdError, PeerError) as error:
            self._note("the topology cannot be read", key, error)
            await self._backoff.pause()
            return
        self._inbox.put_own(TopologySeen(topology, found.mod_revision if found else 0, read=True))

    async def _reread_operation(self, operation_id: str) -> None:
        key = self._keys.operation(operation_id)
        try:
            found = await self._client.get(key, timeout_s=CALL_LIMIT_S)
            operation = self._view.parse(key, found.value, Operation) if found else None
        except PeerError as error:
            self._note("an operation cannot be read", key, error)
            self._inbox.put_own(OperationUnknown(operation_id))
            return
        except EtcdError as error:
            self._note("an operation cannot be read", key, error)
            await self._backoff.pause()
            return
        if found is None or operation is None:
            self._inbox.put_own(OperationGone(operation_id))
        else:
            self._inbox.put_own(OperationSeen(operation, found.mod_revision, read=True))

    def _count_phases(self, event: Event) -> None:
        into = self.switch_s if event.details.get("planned") else self.failover_s
        for name, phase in PHASES.get(event.kind, {}).items():
            value = event.details.get(name)
            if isinstance(value, int | float):
                into.setdefault(phase, Buckets(PHASE_BOUNDS_S)).observe(value)
