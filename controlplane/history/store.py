"""Reading and writing the history. Never on the path of a decision: see `writer.py`."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Row, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.contract.audit import Action, AuditEntry
from controlplane.contract.auth import Caller, Role
from controlplane.contract.events import Event, EventKind
from controlplane.contract.figures import Figures
from controlplane.contract.incidents import TOLD_BY, Incident
from controlplane.contract.records import Operation
from controlplane.contract.revocations import Revocation
from controlplane.history import incidents, schema
from controlplane.history.tables import batches, events, figures, operations

LIMIT_MAX = 1000
# That are looked through for incidents, the newest ones. 2,000: 5 ms of the loop's own thread, some 200 ms of others.
INCIDENT_EVENTS_MAX = 2000
CONTROLLER_ROLE = "controller"
REVOCATION = "token"  # kind of an entry that is about no operation
FIGURES_KEPT_S = 24 * 3600.0
FIGURES_ROWS_MAX = 20_000  # that one question reads: a day of them, every five seconds
_KINDS = frozenset(kind.value for kind in EventKind)
_ACTIONS = frozenset(action.value for action in Action)  # a newer release may have written others
_details_type = dict[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Audit:
    """One line of the audit: what was asked of, or decided about, an operation; or what was revoked."""

    action: Action
    about: Operation | Revocation
    unix_s: float
    epoch: int = 0  # counter of the topology at that time
    caller: Caller | None = None  # None: a controller did it by itself
    reason: str = ""
    message: str = ""  # "": the operation's own
    once: bool = False  # left out if there is such a line already, of this operation and time

    def row(self) -> dict[str, object]:
        """What is told of it, as columns of the table."""
        about = self.about
        if isinstance(about, Revocation):
            return {
                "operation_id": about.id,
                "kind": REVOCATION,
                "node": "",
                "substitute": "",
                "message": about.name,
            }
        return {
            "operation_id": about.id[:200],
            "kind": about.kind.value,
            "node": about.node[:200],
            "substitute": (about.substitute or "")[:200],
            "message": self.message or about.message,
        }


def submitted(operation: Operation) -> Audit | None:
    """The audit's first line about an operation; None where older code has written it. All who make it make the same
    one, of which the history keeps one."""
    asked = operation.asked
    if asked is None:
        return None
    role = Role(asked.role) if asked.role in set(Role) else Role.OPERATOR
    caller = Caller(asked.who, role, asked.address)
    begun = msgspec.structs.replace(operation, message="")
    return Audit(Action.SUBMITTED, begun, begun.created_unix_s, asked.epoch, caller, asked.reason, once=True)


class HistoryStore:
    """The history of one cluster in one database, which several clusters may share.

    Every method raises SQLAlchemy's errors when the database is away.
    """

    def __init__(self, url: str, cluster: str, recorded_by: str) -> None:
        self._engine: AsyncEngine = schema.make_engine(url)
        self._reader = self._engine.execution_options(kf_read_only=True)
        self._cluster = cluster
        self._recorded_by = recorded_by
        self._writer = f"{recorded_by[:180]}/{secrets.token_hex(8)}"  # of this process

    async def upgrade(self) -> None:
        """Bring the schema to this release; see `schema.upgrade`."""
        await schema.upgrade(self._engine)

    async def append(self, batch: Sequence[Event | Audit | Figures], number: int = 0) -> None:
        """Write a batch in one transaction, in order.

        `number`: of the batch, each above the one before. One that was stored already, although its writer was not
        told, is not stored again. 0: it is written in any case.
        """
        rows = [_storable(self._event_row(item)) for item in batch if isinstance(item, Event)]
        measured = [_storable(self._figures_row(item)) for item in batch if isinstance(item, Figures)]
        audits = [(item.once, _storable(self._audit_row(item))) for item in batch if isinstance(item, Audit)]
        async with self._engine.begin() as connection:
            if number and not await self._is_new(connection, number):
                return
            if rows:
                await connection.execute(insert(events), rows)
            if fresh := await self._fresh(connection, audits):
                await connection.execute(insert(operations), fresh)
            if measured:
                await connection.execute(insert(figures), measured)

    async def _is_new(self, connection: AsyncConnection, number: int) -> bool:
        """Whether this writer has not stored the batch yet; if so, it has from the end of the transaction on. A
        transaction of before the connection broke, which still goes on, is waited for."""
        row, stored = self._mark(self._writer, number)
        stored = stored.on_conflict_do_update(
            index_elements=["cluster", "writer"],
            set_={"number": number, "unix_s": row["unix_s"]},
            where=batches.c.number < number,
        )
        return (await connection.execute(stored)).rowcount > 0

    async def _fresh(
        self, connection: AsyncConnection, audits: Sequence[tuple[bool, dict[str, object]]]
    ) -> list[dict[str, object]]:
        """Without the lines that are to be there once and are. Each is asked for in the same order by all who write
        them: two would wait for each other."""
        again = set()
        for index in sorted(
            (k for k, (once, _) in enumerate(audits) if once), key=lambda k: _about(audits[k][1])
        ):
            if not await self._is_first(connection, audits[index][1]):
                again.add(index)
        return [row for index, (_, row) in enumerate(audits) if index not in again]

    async def _is_first(self, connection: AsyncConnection, row: dict[str, object]) -> bool:
        """Whether there is no such line of the audit yet. Two that write it at once: the second one waits for the
        first, by a mark that need not be there for longer."""
        mark = hashlib.sha256(_about(row)).hexdigest()
        _, stored = self._mark(f"audit/{mark}", 1)
        if not (await connection.execute(stored.on_conflict_do_nothing())).rowcount:
            return False
        known = select(operations.c.id).where(
            operations.c.cluster == self._cluster,
            operations.c.operation_id == row["operation_id"],
            operations.c.action == row["action"],
            operations.c.unix_s == row["unix_s"],
        )
        return (await connection.execute(known.limit(1))).first() is None

    def _mark(self, writer: str, number: int) -> tuple[dict[str, object], Any]:
        """A row of `batches`, and the statement that inserts it."""
        # Of the dialect that is loaded anyway: the other one would take long to import.
        dialect: Any = importlib.import_module(f"sqlalchemy.dialects.{self._engine.dialect.name}")
        row: dict[str, object] = {
            "cluster": self._cluster, "writer": writer, "number": number, "unix_s": time.time()
        }  # fmt: skip
        return row, dialect.insert(batches).values(row)

    async def tail(self, limit: int, after: int = 0) -> list[tuple[int, Event]]:
        """The newest `limit` events (at most 1,000) with an id above `after`, as (id, event), oldest first."""
        query = (
            select(events)
            .where(events.c.cluster == self._cluster, events.c.id > after)
            .order_by(events.c.id.desc())
            .limit(max(1, min(limit, LIMIT_MAX)))
        )
        async with self._reader.connect() as connection:
            rows = (await connection.execute(query)).all()
        # A newer release may have written kinds that this one does not know.
        return [(row.id, _event(row)) for row in reversed(rows) if row.kind in _KINDS]

    async def incidents(self, limit: int) -> list[Incident]:
        """The newest `limit` failures, oldest first. One whose beginning is no longer among the newest
        `INCIDENT_EVENTS_MAX` events that tell of failures is not told."""
        query = (
            select(events)
            .where(events.c.cluster == self._cluster, events.c.kind.in_(TOLD_BY))
            .order_by(events.c.id.desc())
            .limit(INCIDENT_EVENTS_MAX)
        )
        async with self._reader.connect() as connection:
            rows = (await connection.execute(query)).all()
        # Thousands of rows: in a thread, so that a controller goes on meanwhile.
        found = await asyncio.to_thread(
            lambda: incidents.incidents((row.id, _event(row)) for row in reversed(rows))
        )
        return found[-max(1, min(limit, LIMIT_MAX)) :]

    async def figures(self, since_unix_s: float, until_unix_s: float, rows_max: int) -> list[Figures]:
        """Rows of that time, oldest first; of more than `rows_max` only so many are given, spread evenly."""
        query = (
            select(figures.c.body)
            .where(
                figures.c.cluster == self._cluster,
                figures.c.unix_s > since_unix_s,
                figures.c.unix_s <= until_unix_s,
            )
            .order_by(figures.c.unix_s.desc())
            .limit(FIGURES_ROWS_MAX)
        )
        async with self._reader.connect() as connection:
            texts = [row.body for row in (await connection.execute(query)).all()]
        step = max(1, -(-len(texts) // max(1, rows_max)))
        chosen = texts[::step][::-1]
        return await asyncio.to_thread(lambda: [msgspec.json.decode(text, type=Figures) for text in chosen])

    async def audit(self, limit: int, after: int = 0, operation_id: str = "") -> list[AuditEntry]:
        """The newest `limit` entries (at most 1,000) with an id above `after`, oldest first; of one operation, if one
        is named."""
        begun = (
            func.first_value(operations.c.epoch)
            .over(partition_by=operations.c.operation_id, order_by=operations.c.id)
            .label("epoch_before")
        )
        known = select(operations, begun).where(operations.c.cluster == self._cluster)
        if operation_id:
            known = known.where(operations.c.operation_id == operation_id)
        every = known.subquery()
        query = (
            select(every)
            .where(every.c.id > after, every.c.action.in_(_ACTIONS))
            .order_by(every.c.id.desc())
            .limit(max(1, min(limit, LIMIT_MAX)))
        )
        async with self._reader.connect() as connection:
            rows = (await connection.execute(query)).all()
        return [_entry(row) for row in reversed(rows)]

    async def prune(self, keep: int) -> int:
        """Keep the newest `keep` events; returns how many were deleted. The audit is kept: one row for each thing
        that an operator did, and its end."""
        ids = select(events.c.id).where(events.c.cluster == self._cluster)
        oldest_kept = ids.order_by(events.c.id.desc()).offset(keep).limit(1).scalar_subquery()
        old = delete(events).where(
            events.c.cluster == self._cluster, events.c.id <= func.coalesce(oldest_kept, 0)
        )
        async with self._engine.begin() as connection:
            return (await connection.execute(old)).rowcount

    async def prune_figures(self, before_unix_s: float) -> int:
        """Delete rows of figures that are older; returns how many. Also what is known of writers that have not written
        since."""
        old = delete(figures).where(figures.c.cluster == self._cluster, figures.c.unix_s < before_unix_s)
        gone = delete(batches).where(batches.c.cluster == self._cluster, batches.c.unix_s < before_unix_s)
        async with self._engine.begin() as connection:
            await connection.execute(gone)
            return (await connection.execute(old)).rowcount

    async def close(self) -> None:
        await self._engine.dispose()

    def _event_row(self, item: Event) -> dict[str, object]:
        return {
            "cluster": self._cluster,
            "unix_s": item.unix_s,
            "kind": item.kind.value,
            "subject": item.subject[:200],
            "message": item.message,
            "epoch": item.epoch,
            "details": msgspec.json.encode(item.details).decode(),
            "recorded_by": self._recorded_by,
        }

    def _figures_row(self, item: Figures) -> dict[str, object]:
        return {
            "cluster": self._cluster,
            "unix_s": item.unix_s,
            "body": msgspec.json.encode(item).decode(),
        }

    def _audit_row(self, item: Audit) -> dict[str, object]:
        return {
            "cluster": self._cluster,
            "unix_s": item.unix_s,
            "action": item.action.value,
            **item.row(),
            "recorded_by": self._recorded_by,
            "who": item.caller.name if item.caller else self._recorded_by,
            "role": item.caller.role.value if item.caller else CONTROLLER_ROLE,
            "address": item.caller.address[:200] if item.caller else "",
            "reason": item.reason,
            "epoch": item.epoch,
        }


def _about(row: dict[str, object]) -> bytes:
    """What a line of the audit that is there once is known by."""
    return msgspec.json.encode([row["operation_id"], row["action"], row["unix_s"]])


def _storable(row: dict[str, object]) -> dict[str, object]:
    """PostgreSQL refuses NUL in a text."""
    return {
        name: value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value
        for name, value in row.items()
    }


def _entry(row: Row[tuple[object, ...]]) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        unix_s=row.unix_s,
        action=Action(row.action),
        operation=row.operation_id,
        kind=row.kind,
        node=row.node,
        substitute=row.substitute,
        message=row.message,
        reason=row.reason,
        who=row.who,
        role=row.role,
        address=row.address,
        epoch_before=row.epoch_before,
        epoch_after=row.epoch,
        recorded_by=row.recorded_by,
    )


def _event(row: Row[tuple[object, ...]]) -> Event:
    return Event(
        kind=EventKind(row.kind),
        subject=row.subject,
        message=row.message,
        unix_s=row.unix_s,
        epoch=row.epoch,
        details=msgspec.json.decode(row.details, type=_details_type),
    )
