"""A task that writes history behind a bounded queue, so that a slow or absent database delays nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from controlplane.backoff import Backoff
from controlplane.contract.audit import AuditEntry
from controlplane.contract.errors import ConfigError, Unavailable
from controlplane.contract.events import Event
from controlplane.contract.figures import Figures
from controlplane.contract.incidents import Incident
from controlplane.history.store import FIGURES_KEPT_S, Audit, HistoryStore

log = structlog.get_logger()
T = TypeVar("T")
Record = Event | Audit | Figures

QUEUE_LEN_MAX = 4096
BATCH_LEN_MAX = 256
CALL_LIMIT_S = 10.0
AWAY_LIMIT_S = 1.0  # ... of a read when the last write failed: others wait behind it
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 5.0
KEEP_ROWS = 100_000
PRUNE_EVERY_ROWS = 5_000
PRUNE_FIGURES_EVERY = 500  # rows
REFUSALS = ("22", "23")  # classes of SQLSTATE: of a value, and of a constraint


class HistoryWriter:
    """Takes records at once, writes them in order in the background.

    While the database is away records wait; above `QUEUE_LEN_MAX` the oldest are dropped and counted: figures first,
    then events, and of the audit only what is left. A batch that was begun waits beside them and is written again as it
    is, under the same number, until the database says that it has it: so its records stand there once. One that the
    database refuses for what is in it is written record by record, and only what is refused alone is dropped.
    """

    def __init__(
        self, store: HistoryStore, keep_rows: int = KEEP_ROWS, queue_len_max: int = QUEUE_LEN_MAX
    ) -> None:
        self._store = store
        self._keep_rows = keep_rows
        self._queue_len_max = queue_len_max
        self._queue: deque[Record] = deque()
        self._batch: list[Record] = []  # begun, and not known to be stored
        self._number = 0  # of the batch
        self._singly: deque[Record] = deque()  # of a batch that was refused: each becomes a batch
        self._news = asyncio.Event()
        self._tried = asyncio.Event()  # whether the database is there has been found out
        # It has our schema: what it cannot write, on a full disk say, it can still read.
        self._upgraded = False
        self._since_prune = 0
        self._figures_since_prune = 0
        self.written = 0
        self.dropped = 0
        self.failures = 0
        self.healthy = False  # the schema is there, and the last write went well

    @property
    def waiting(self) -> int:
        """Records that are not known to be stored."""
        return len(self._queue) + len(self._singly) + len(self._batch)

    def put(self, record: Record) -> None:
        """Never waits, never fails. What is for the audit is logged, too: so it is told while the database is away."""
        if isinstance(record, Audit):
            _log(record)
        while len(self._queue) >= self._queue_len_max:
            self._drop_oldest()
        self._queue.append(record)
        self._news.set()

    def _drop_oldest(self) -> None:
        """The oldest of the kind that is missed least."""
        for kind in (Figures, Event, Audit):
            found = next((i for i, record in enumerate(self._queue) if isinstance(record, kind)), None)
            if found is not None:
                del self._queue[found]
                break
        self.dropped += 1

    async def run(self) -> None:
        """Upgrade the schema, then write until cancelled."""
        await self._retry(self._store.upgrade)
        self._upgraded = True
        while True:
            await self._news.wait()
            self._news.clear()
            while self.waiting:
                await self._retry(self._write_batch)

    async def flush(self, limit_s: float) -> None:
        """A last attempt before the process exits; what cannot be written in time is lost, and logged."""
        try:
            async with asyncio.timeout(limit_s):
                while self.waiting and self.healthy:
                    await self._write_batch()
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            log.warning("history records lost at exit", records=self.waiting, error=repr(error))

    async def tail(self, limit: int, after: int) -> list[tuple[int, Event]]:
        """Events as stored. Raises Unavailable while the database is away, as the other reads do."""
        return await self._read(lambda: self._store.tail(limit, after))

    async def incidents(self, limit: int) -> list[Incident]:
        """The newest failures, oldest first."""
        return await self._read(lambda: self._store.incidents(limit))

    async def figures(self, since_unix_s: float, until_unix_s: float, rows_max: int) -> list[Figures]:
        """Rows of that time, oldest first, `rows_max` at most."""
        return await self._read(lambda: self._store.figures(since_unix_s, until_unix_s, rows_max))

    async def audit(self, limit: int, after: int, operation_id: str) -> list[AuditEntry]:
        """The newest entries, oldest first; of one operation, if one is named."""
        return await self._read(lambda: self._store.audit(limit, after, operation_id))

    async def _read(self, query: Callable[[], Awaitable[T]]) -> T:
        if not self.healthy:  # at the start of a controller it is about to be
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_LIMIT_S):
                    await self._tried.wait()
        if not self.healthy and not self._upgraded:
            raise Unavailable("the history database is away; see the controller's log")
        try:
            async with asyncio.timeout(CALL_LIMIT_S if self.healthy else AWAY_LIMIT_S):
                return await query()
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise Unavailable(f"the history database is away: {type(error).__name__}") from error

    async def _write_batch(self) -> None:
        if not self._batch:
            queue, records_max = (self._singly, 1) if self._singly else (self._queue, BATCH_LEN_MAX)
            self._batch = [queue.popleft() for _ in range(min(len(queue), records_max))]
            self._number += 1
        try:
            await self._store.append(self._batch, self._number)
        except (StatementError, ValueError, OverflowError) as error:
            if not _is_refusal(error):
                raise
            self._refused(error)
            return
        batch, self._batch = self._batch, []
        self.written += len(batch)
        self._since_prune += len(batch)
        if self._since_prune >= PRUNE_EVERY_ROWS:
            self._since_prune = 0
            await self._store.prune(self._keep_rows)
        self._figures_since_prune += sum(isinstance(record, Figures) for record in batch)
        if self._figures_since_prune >= PRUNE_FIGURES_EVERY:
            self._figures_since_prune = 0
            await self._store.prune_figures(time.time() - FIGURES_KEPT_S)

    def _refused(self, error: Exception) -> None:
        """The batch cannot be written, now or later."""
        batch, self._batch = self._batch, []
        if len(batch) > 1:
            self._singly.extend(batch)
            return
        self.dropped += 1
        log.error(
            "the history database refuses a record, which is dropped",
            record=repr(batch[0])[:300],
            error=repr(error)[:300],
            dropped=self.dropped,
        )

    async def _retry(self, action: Callable[[], Awaitable[None]]) -> None:
        """Run `action` until it succeeds: history is worth waiting for as long as nobody waits for it."""
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        while True:
            try:
                async with asyncio.timeout(CALL_LIMIT_S):
                    await action()
                self.healthy = True
                self._tried.set()
                return
            except (SQLAlchemyError, OSError, TimeoutError, ConfigError) as error:
                self.healthy = False
                self._tried.set()
                self.failures += 1
                log.warning(
                    "history database is away",
                    error=repr(error)[:300],
                    waiting=self.waiting,
                    dropped=self.dropped,
                )
            await backoff.pause()


def _is_refusal(error: Exception) -> bool:
    """Of what is in a record, which is refused as often as it is written, rather than of a database that is away."""
    if not isinstance(error, DBAPIError):
        return True  # the driver could not even bind it
    if error.connection_invalidated:
        return False
    # asyncpg's errors of data are not SQLAlchemy's DataError.
    state = getattr(error.orig, "sqlstate", None) or ""
    return isinstance(error, DataError | IntegrityError) or state.startswith(REFUSALS)


def _log(record: Audit) -> None:
    row, caller = record.row(), record.caller
    log.info(
        "audit", action=record.action.value, operation=row["operation_id"], kind=row["kind"], node=row["node"],
        who=caller.name if caller else "", role=caller.role.value if caller else "",
        address=caller.address if caller else "", epoch=record.epoch, reason=record.reason,
    )  # fmt: skip
