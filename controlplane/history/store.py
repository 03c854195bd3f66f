"""Reading and writing the history. Never on the path of a decision: see `writer.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy import Row, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.contract.events import Event, EventKind
from controlplane.contract.records import Operation
from controlplane.history import schema
from controlplane.history.tables import events, operations

LIMIT_MAX = 1000
_KINDS = frozenset(kind.value for kind in EventKind)
_details_type = dict[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Audit:
    """One line of the audit: what was asked of, or decided about, an operation."""

    action: str  # submitted, refused, cancelled, done, failed
    operation: Operation
    unix_s: float


class HistoryStore:
    """The history of one cluster in one database, which several clusters may share.

    Every method raises SQLAlchemy's errors when the database is away.
    """

    def __init__(self, url: str, cluster: str, recorded_by: str) -> None:
        self._engine: AsyncEngine = schema.make_engine(url)
        self._reader = self._engine.execution_options(kf_read_only=True)
        self._cluster = cluster
        self._recorded_by = recorded_by

    async def upgrade(self) -> None:
        """Bring the schema to this release; see `schema.upgrade`."""
        await schema.upgrade(self._engine)

    async def append(self, batch: Sequence[Event | Audit]) -> None:
        """Write a batch in one transaction, in order."""
        rows = [self._event_row(item) for item in batch if isinstance(item, Event)]
        audits = [self._audit_row(item) for item in batch if isinstance(item, Audit)]
        async with self._engine.begin() as connection:
            if rows:
                await connection.execute(insert(events), rows)
            if audits:
                await connection.execute(insert(operations), audits)

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

    async def audit(self, operation_id: str) -> list[tuple[str, float]]:
        """What happened to one operation, oldest first, as (action, unix seconds)."""
        query = (
            select(operations.c.action, operations.c.unix_s)
            .where(operations.c.cluster == self._cluster, operations.c.operation_id == operation_id)
            .order_by(operations.c.id)
        )
        async with self._reader.connect() as connection:
            return [(row.action, row.unix_s) for row in await connection.execute(query)]

    async def prune(self, keep: int) -> int:
        """Keep the newest `keep` rows of each table; returns how many were deleted."""
        deleted = 0
        async with self._engine.begin() as connection:
            for table in (events, operations):
                ids = select(table.c.id).where(table.c.cluster == self._cluster)
                oldest_kept = ids.order_by(table.c.id.desc()).offset(keep).limit(1).scalar_subquery()
                done = await connection.execute(
                    delete(table).where(
                        table.c.cluster == self._cluster, table.c.id <= func.coalesce(oldest_kept, 0)
                    )
                )
                deleted += done.rowcount
        return deleted

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

    def _audit_row(self, item: Audit) -> dict[str, object]:
        operation = item.operation
        return {
            "cluster": self._cluster,
            "unix_s": item.unix_s,
            "operation_id": operation.id[:200],
            "action": item.action,
            "kind": operation.kind.value,
            "node": operation.node[:200],
            "substitute": (operation.substitute or "")[:200],
            "message": operation.message,
            "recorded_by": self._recorded_by,
        }


def _event(row: Row[tuple[object, ...]]) -> Event:
    return Event(
        kind=EventKind(row.kind),
        subject=row.subject,
        message=row.message,
        unix_s=row.unix_s,
        epoch=row.epoch,
        details=msgspec.json.decode(row.details, type=_details_type),
    )
