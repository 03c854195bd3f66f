"""Bringing the database to the schema of this release. Safe when several controllers start at once."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sqlite3
import time
from typing import Any

from sqlalchemy import Connection, Dialect, event, inspect, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from controlplane.contract.config import hidden_password
from controlplane.contract.errors import ConfigError
from controlplane.history.tables import REVISION

DIALECTS = {
    "sqlite": "sqlite+aiosqlite:////PATH/FILE.db",
    "postgresql": "postgresql+asyncpg://USER@HOST:5432/NAME",
}
BUSY_TIMEOUT_S = 5
BUSY_AGAIN_S = 0.02
LOG_AHEAD = "PRAGMA journal_mode=WAL"
# Any constant: PostgreSQL's advisory locks are named by numbers.
UPGRADE_LOCK = 0x6B65766C


def make_engine(url: str) -> AsyncEngine:
    """An engine whose transactions really begin at BEGIN, on SQLite too. Raises ConfigError for a URL of no use."""
    try:
        server = not url.startswith("sqlite")
        options = _of_asyncpg() if url.startswith("postgresql+asyncpg:") else {}
        engine = create_async_engine(
            url, pool_size=2, max_overflow=0, pool_pre_ping=server, connect_args=options
        )
    except (SQLAlchemyError, ImportError, ValueError, TypeError) as error:
        # An unknown dialect, a driver that is not installed or knows no asyncio, a port that is no number. What they
        # say may have the password in it.
        raise _unusable(url, error) from None
    if engine.dialect.name not in DIALECTS or not 0 <= (engine.url.port or 0) < 65536:
        raise _unusable(url)

    def connect(dialect: Dialect, _: ConnectionPoolEntry, args: list[Any], options: dict[str, Any]) -> object:
        try:
            return dialect.connect(*args, **options)
        except (TypeError, ValueError, OverflowError) as error:  # what stands in the query of the URL
            raise _unusable(url) from error

    event.listen(engine.sync_engine, "do_connect", connect)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_immediate)
    return engine


def _of_asyncpg() -> dict[str, Any]:
    asyncpg: Any = importlib.import_module("asyncpg")

    class Connection(asyncpg.Connection):  # type: ignore[misc]  # optional, and without types
        async def close(self, *, timeout: float | None = None) -> None:
            """At once. asyncpg would wait without a limit for the server's word that what was cancelled has ended: a
            server that hangs would hold up whoever has given it up."""
            self.terminate()

    return {"connection_class": Connection}


def _unusable(url: str, error: Exception | None = None) -> ConfigError:
    missing = f" ({error})" if isinstance(error, ImportError) else ""
    forms = " and ".join(DIALECTS.values())
    return ConfigError(f"database_url = {hidden_password(url)!r}{missing}: what works is {forms}")


async def upgrade(engine: AsyncEngine) -> None:
    """Run the migrations that are missing.

    Raises ConfigError when the database belongs to a newer release, and SQLAlchemy's errors when it is away.
    """
    if engine.dialect.name == "sqlite":
        await asyncio.to_thread(_log_ahead, engine.url.database or "")
    async with engine.begin() as connection:
        await connection.run_sync(_upgrade)


def _log_ahead(path: str) -> None:
    """Give the file a write-ahead log, which stays: readers then never wait for the writer, nor it for them.

    The change wants the file for itself, and SQLite refuses it at once, whatever its busy timeout says.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute(LOG_AHEAD)
            return
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise OperationalError(LOG_AHEAD, None, error) from error
        time.sleep(BUSY_AGAIN_S)


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": UPGRADE_LOCK})
    if _revisions(connection) != [REVISION]:
        from controlplane.history.migrate import migrate  # alembic: not where there is nothing to migrate

        migrate(connection)


def _revisions(connection: Connection) -> list[str]:
    """What the database says of its schema; nothing: it is blank."""
    if not inspect(connection).has_table("alembic_version"):
        return []
    return list(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())


def _prepare_sqlite(connection: object, _entry: ConnectionPoolEntry) -> None:
    # Python's driver would begin transactions by its own rules, and never around DDL.
    connection.isolation_level = None  # type: ignore[attr-defined]
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    # IMMEDIATE takes the write lock first: the second controller waits instead of failing half-way. Reads
    # ask for a deferred transaction by an execution option, so that they never wait for a writer.
    deferred = connection.get_execution_options().get("kf_read_only", False)
    connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")
