"""The history on a real SQLite file: schema, order, bounds, and a database that goes away."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

import migrations
from controlplane.contract.audit import Action, AuditEntry
from controlplane.contract.auth import Caller, Role
from controlplane.contract.credentials import Change, CredentialChange
from controlplane.contract.errors import ConfigError, Unavailable
from controlplane.contract.events import Event, EventKind
from controlplane.contract.figures import Figures
from controlplane.contract.records import Asked, Operation, OperationKind
from controlplane.contract.revocations import Revocation
from controlplane.history import schema
from controlplane.history.credentials import line_of
from controlplane.history.store import Audit, HistoryStore, submitted
from controlplane.history.tables import REVISION, metadata
from controlplane.history.writer import HistoryWriter


def url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


@pytest.mark.parametrize(
    "wrong",
    [
        "foo://",
        "sqlite://x",
        "sqlite:///x",
        "mysql+nothing://h/x",
        "postgresql://h/x",
        "postgresql+asyncpg://h:99999/x",
        "postgresql+asyncpg://u:s3cret@h:abc/db",
        "postgresql+asyncpg://u:s3cret@[::1/db",
    ],
)
def test_a_url_of_no_use_is_told_as_one(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"database_url = .*postgresql\+asyncpg") as caught:
        HistoryStore(wrong, "c", "c1")
    assert "s3cret" not in str(caught.value)


def test_a_query_that_the_driver_does_not_know_keeps_the_history_waiting() -> None:
    """As a database that is away: the controller goes on."""

    async def main() -> None:
        for query in ("nonsense=1", "host=127.0.0.1:99999"):
            engine = schema.make_engine(f"postgresql+asyncpg://u@127.0.0.1:1/db?{query}")
            with pytest.raises(ConfigError, match="database_url"):
                async with engine.connect():
                    pass
            await engine.dispose()

    asyncio.run(main())


def event(number: int, kind: EventKind = EventKind.DIED) -> Event:
    return Event(
        kind=kind,
        subject=f"n{number}",
        message=f"event {number}",
        unix_s=1000.5 + number,
        epoch=number,
        details={"silent_s": 0.25, "evidence": "stream broken", "streams": 3},
    )


async def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def test_events_come_back_as_written_and_page_by_id(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        await store.upgrade()
        written = [event(number) for number in range(10)]
        await store.append(written)
        everything = await store.tail(100)
        assert [item for _, item in everything] == written
        newest = await store.tail(3)
        assert newest == everything[-3:]
        assert await store.tail(100, after=everything[6][0]) == everything[7:]
        assert await store.tail(100, after=everything[-1][0]) == []
        await store.close()

    asyncio.run(main())


def test_clusters_share_a_database_without_seeing_each_other(tmp_path: Path) -> None:
    async def main() -> None:
        one, two = (HistoryStore(url(tmp_path / "h.db"), name, "c1") for name in ("one", "two"))
        await one.upgrade()
        await one.append([event(number) for number in range(5)])
        await two.append([event(9)])
        assert [item.subject for _, item in await two.tail(100)] == ["n9"]
        assert await one.prune(2) == 3
        assert [item.subject for _, item in await one.tail(100)] == ["n3", "n4"]
        assert len(await two.tail(100)) == 1
        await one.close()
        await two.close()

    asyncio.run(main())


def test_an_id_is_never_used_again_after_pruning(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        await store.upgrade()
        await store.append([event(1), event(2)])
        newest = (await store.tail(1))[0][0]
        assert await store.prune(0) == 2
        await store.append([event(3)])
        assert (await store.tail(1))[0][0] > newest
        await store.close()

    asyncio.run(main())


def test_audit_of_an_operation(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        other = HistoryStore(url(tmp_path / "h.db"), "other", "c9")
        await store.upgrade()
        operation = Operation(id="op-1", kind=OperationKind.DRAIN, node="n2", message="it is empty")
        alice = Caller("alice", Role.OPERATOR, "10.0.0.7")
        begun = Audit(Action.SUBMITTED, operation, 1.0, 12, alice, "disk of n2 is failing")
        await other.append([begun])
        await store.append([begun, event(1), Audit(Action.DONE, operation, 2.0, 15)])
        second = Operation(id="op-2", kind=OperationKind.PAUSE)
        await store.append([Audit(Action.REFUSED, second, 3.0, 15, alice)])
        first, done, refused = await store.audit(100)
        assert first == AuditEntry(
            id=first.id,
            unix_s=1.0,
            action=Action.SUBMITTED,
            operation="op-1",
            kind="drain",
            node="n2",
            substitute="",
            message="it is empty",
            reason="disk of n2 is failing",
            who="alice",
            role="operator",
            address="10.0.0.7",
            epoch_before=12,
            epoch_after=12,
            recorded_by="c1",
        )
        assert (done.action, done.who, done.role, done.address) == (Action.DONE, "c1", "controller", "")
        assert (done.epoch_before, done.epoch_after) == (12, 15)
        assert await store.audit(100, operation_id="op-2") == [refused]
        # Only what is asked for comes back, and the epoch of the beginning is known all the same.
        assert await store.audit(2) == [done, refused]
        assert await store.audit(100, after=first.id) == [done, refused]
        assert len(await store.tail(10)) == 1
        await store.append([Audit(Action.REVOKED, Revocation("t12", "bob", 99, "admin"), 4.0, 15, alice)])
        (taken,) = await store.audit(1)
        assert (taken.action, taken.who, taken.operation) == (Action.REVOKED, "alice", "t12")
        assert (taken.kind, taken.message) == ("token", "bob")
        await store.close()
        await other.close()

    asyncio.run(main())


def test_the_first_line_about_an_operation_is_kept_once_whoever_writes_it(tmp_path: Path) -> None:
    """The controller that accepted it, and every leader that takes it up."""

    async def main() -> None:
        first, second = (HistoryStore(url(tmp_path / "h.db"), "c", name) for name in ("c1", "c2"))
        await first.upgrade()
        asked = Asked("alice", "a role to come", "10.0.0.7", "a disk fails", 12)
        operation = Operation("op-1", OperationKind.DRAIN, "n2", created_unix_s=1.5, asked=asked)
        begun = submitted(operation)
        taken_up = submitted(msgspec.structs.replace(operation, message="moves p0/1"))
        assert begun is not None
        assert begun == taken_up
        await first.append([begun, begun], 1)
        await second.append([begun, event(1)], 1)
        with sqlite3.connect(tmp_path / "h.db") as connection:
            connection.execute("delete from batches")  # as a day later
        await second.append([begun], 2)
        (line,) = await first.audit(10)
        assert (line.who, line.address, line.reason, line.recorded_by) == (
            "alice", "10.0.0.7", "a disk fails", "c1"
        )  # fmt: skip
        assert (line.unix_s, line.epoch_before, line.message) == (1.5, 12, "")
        again = submitted(msgspec.structs.replace(operation, created_unix_s=99.0))  # its id is free again
        assert again is not None
        await second.append([again])
        assert [entry.unix_s for entry in await second.audit(10)] == [1.5, 99.0]
        assert submitted(msgspec.structs.replace(operation, asked=None)) is None
        await first.close()
        await second.close()

    asyncio.run(main())


def test_the_audit_can_neither_be_changed_nor_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        await store.upgrade()
        operation = Operation(id="op-1", kind=OperationKind.DRAIN, node="n2")
        await store.append([event(1), Audit(Action.SUBMITTED, operation, 1.0)])
        with sqlite3.connect(tmp_path / "h.db") as connection:
            for change in ("update operations_audit set who = 'nobody'", "delete from operations_audit"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    connection.execute(change)
        assert await store.prune(0) == 1  # the event
        assert [entry.operation for entry in await store.audit(10)] == ["op-1"]
        await store.close()

    asyncio.run(main())


def test_migrations_go_forward_and_back(tmp_path: Path) -> None:
    """What the first release wrote is still there after each step."""
    file = tmp_path / "h.db"

    def migrate(connection: Connection, move: Callable[..., None], revision: str) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        move(config, revision)

    async def go(move: Callable[..., None], revision: str) -> None:
        engine = schema.make_engine(url(file))
        async with engine.begin() as connection:
            await connection.run_sync(migrate, move, revision)
        await engine.dispose()

    def rows() -> list[tuple[object, ...]]:
        with sqlite3.connect(file) as connection:
            return connection.execute("select operation_id, action from operations_audit").fetchall()

    asyncio.run(go(command.upgrade, "0001"))
    with sqlite3.connect(file) as connection:
        connection.execute(
            "insert into operations_audit values (1, 'c', 1.0, 'op-1', 'done', 'drain', 'n2', '', '', 'c1')"
        )
    asyncio.run(go(command.upgrade, "head"))

    async def read() -> list[AuditEntry]:
        store = HistoryStore(url(file), "c", "c1")
        found = await store.audit(10)
        await store.close()
        return found

    (old,) = asyncio.run(read())
    assert (old.operation, old.who, old.epoch_before) == ("op-1", "", 0)
    asyncio.run(go(command.downgrade, "0001"))
    assert rows() == [("op-1", "done")]
    with sqlite3.connect(file) as connection:
        connection.execute("delete from operations_audit")  # the triggers are gone with their release
    asyncio.run(go(command.upgrade, "head"))
    assert rows() == []


def test_the_schema_upgrades_once_when_controllers_start_together(tmp_path: Path) -> None:
    async def main() -> None:
        stores = [HistoryStore(url(tmp_path / "h.db"), "c", f"c{index}") for index in range(4)]
        await asyncio.gather(*(store.upgrade() for store in stores))
        await stores[0].upgrade()  # and again on a finished one
        await asyncio.gather(*(store.append([event(index)]) for index, store in enumerate(stores)))
        assert len(await stores[0].tail(10)) == 4
        for store in stores:
            await store.close()

    asyncio.run(main())
    with sqlite3.connect(tmp_path / "h.db") as connection:
        assert connection.execute("select version_num from alembic_version").fetchall() == [(REVISION,)]
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)


AGAIN = """
import asyncio, sys
import controlplane.main
from controlplane.history import schema
asyncio.run(schema.upgrade(schema.make_engine(sys.argv[1])))
sys.exit("alembic" in sys.modules)
"""


def test_a_controller_imports_alembic_only_if_migrations_are_missing(tmp_path: Path) -> None:
    def imports_alembic() -> int:
        return subprocess.run([sys.executable, "-c", AGAIN, url(tmp_path / "h.db")], timeout=60).returncode

    assert [imports_alembic(), imports_alembic()] == [1, 0]


def test_migrations_and_tables_agree(tmp_path: Path) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async def main() -> None:
        engine = schema.make_engine(url(tmp_path / "h.db"))
        await schema.upgrade(engine)
        async with engine.begin() as connection:
            assert await connection.run_sync(differences) == []
            # The comparison can fail: a column that nobody declared is seen.
            await connection.execute(text("alter table events add column extra integer"))
            assert await connection.run_sync(differences) != []
        await engine.dispose()

    asyncio.run(main())


def test_a_newer_schema_is_refused_in_words(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        await store.upgrade()
        with sqlite3.connect(tmp_path / "h.db") as connection:
            connection.execute("update alembic_version set version_num = '9999'")
        with pytest.raises(ConfigError, match="does not fit this release"):
            await store.upgrade()
        await store.close()

    asyncio.run(main())


def test_a_failed_upgrade_leaves_nothing_behind(tmp_path: Path) -> None:
    """DDL is inside the transaction: the driver's own rules would have committed the first table."""

    async def main() -> None:
        with sqlite3.connect(tmp_path / "h.db") as connection:
            connection.execute("create table operations_audit (id integer)")  # in the way of the migration
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        with pytest.raises(Exception, match="already exists"):
            await store.upgrade()
        await store.close()

    asyncio.run(main())
    with sqlite3.connect(tmp_path / "h.db") as connection:
        assert {name for (name,) in connection.execute("select name from sqlite_master")} == {
            "operations_audit"
        }


def test_the_writer_survives_a_database_that_comes_late(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "later"  # SQLite cannot open a file in a folder that is missing
        store = HistoryStore(url(folder / "h.db"), "c", "c1")
        writer = HistoryWriter(store, queue_len_max=5)
        for number in range(8):
            writer.put(event(number))
        task = asyncio.create_task(writer.run())
        await until(lambda: writer.failures >= 2)
        assert not writer.healthy
        with pytest.raises(Unavailable):
            await writer.tail(10, 0)
        assert writer.dropped == 3
        folder.mkdir()
        await until(lambda: writer.written == 5)
        assert [item.subject for _, item in await writer.tail(10, 0)] == ["n3", "n4", "n5", "n6", "n7"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    asyncio.run(main())


class Forgetful(HistoryStore):
    """Commits the first batch and does not say so, as when the connection breaks in that moment."""

    calls = 0

    async def append(self, *given: Any) -> None:
        await super().append(*given)
        self.calls += 1
        if self.calls == 1:
            raise OperationalError("COMMIT", None, Exception("the connection was lost"))


def test_a_batch_whose_commit_was_not_confirmed_is_stored_once(tmp_path: Path) -> None:
    async def main() -> None:
        store = Forgetful(url(tmp_path / "h.db"), "c", "c1")
        writer = HistoryWriter(store)
        operation = Operation(id="op-1", kind=OperationKind.PAUSE)
        for record in (event(0), Audit(Action.SUBMITTED, operation, 1.0), Figures(1.0), event(1)):
            writer.put(record)
        task = asyncio.create_task(writer.run())
        await until(lambda: writer.failures == 1)
        writer.put(event(2))  # meanwhile: it goes after what is written again
        await until(lambda: writer.written == 5)
        assert [item.subject for _, item in await store.tail(100)] == ["n0", "n1", "n2"]
        assert len(await store.audit(100)) == 1
        assert len(await store.figures(0.0, 2.0, 100)) == 1
        # Another process of this name counts from the beginning.
        other = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        await other.append([event(3)], 1)
        await other.append([event(3)], 1)
        assert [item.subject for _, item in await store.tail(100)] == ["n0", "n1", "n2", "n3"]
        assert await store.prune_figures(time.time() + 60) == 1  # a day later, of writers that are gone
        with sqlite3.connect(tmp_path / "h.db") as connection:
            assert connection.execute("select count(*) from batches").fetchone() == (0,)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()
        await other.close()

    asyncio.run(main())


def test_the_audit_tells_of_keys_and_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path / "h.db"), "c", "c1")
        await store.upgrade()
        admin = Caller("admin", Role.ADMIN, "10.0.0.7")
        made = CredentialChange(Change.KEY_CREATED, "00aa", "alice", "root@h1", "team a")
        gone = msgspec.structs.replace(made, change=Change.KEY_REVOKED, more="")
        await store.append([line_of(made, admin, 1.0, 7), line_of(gone, admin, 2.0, 9)])
        first, last = await store.audit(10, operation_id="00aa")
        assert (first.action, first.kind, first.message) == (Action.DONE, "create-key", "alice, team a")
        assert (last.action, last.kind, last.message) == (Action.REVOKED, "revoke-key", "alice")
        assert (last.who, last.role, last.address) == ("admin", "admin", "10.0.0.7")
        assert (last.reason, last.epoch_before, last.epoch_after) == ("kfadmin of root@h1", 7, 9)
        await store.close()

    asyncio.run(main())


def test_events_make_room_for_the_audit(tmp_path: Path) -> None:
    async def main(logged: list[structlog.typing.EventDict]) -> None:
        folder = tmp_path / "later"
        store = HistoryStore(url(folder / "h.db"), "c", "c1")
        writer = HistoryWriter(store, queue_len_max=4)
        for number in range(3):
            operation = Operation(id=f"op-{number}", kind=OperationKind.DRAIN, node="n2")
            writer.put(Audit(Action.SUBMITTED, operation, float(number)))
            writer.put(event(number))
            writer.put(event(10 + number))
        assert writer.dropped == 5
        told = [line for line in logged if line["event"] == "audit"]  # at once, not when the database is back
        assert [line["operation"] for line in told] == ["op-0", "op-1", "op-2"]
        folder.mkdir()
        task = asyncio.create_task(writer.run())
        await until(lambda: writer.written == 4)
        assert [entry.operation for entry in await writer.audit(10, 0, "")] == ["op-0", "op-1", "op-2"]
        assert [item.subject for _, item in await writer.tail(10, 0)] == ["n12"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    with structlog.testing.capture_logs() as logged:
        asyncio.run(main(logged))


async def check_that_a_refused_record_goes_alone(url: str) -> None:
    """NUL is replaced; what the driver or the database cannot take is dropped, and nothing beside it."""
    store = HistoryStore(url, "c", "c1")
    writer = HistoryWriter(store)
    operation = Operation(id="op-1", kind=OperationKind.DRAIN, node="n\0002")
    refused = [
        Event(EventKind.DIED, "big", "", 1.0, 2**70),
        Event(EventKind.DIED, "half a pair", "\ud800", 1.0),
        Audit(Action.SUBMITTED, Operation(id="op-\ud800", kind=OperationKind.PAUSE), 1.0),
        Figures(None),  # type: ignore[arg-type]  # a constraint
    ]
    kept = [event(0), Audit(Action.REFUSED, operation, 1.0, reason="a\0b"), Figures(1.0), event(1)]
    for record in (refused[0], *kept[:2], refused[1], kept[2], *refused[2:], kept[3]):
        writer.put(record)
    task = asyncio.create_task(writer.run())
    await until(lambda: writer.written == len(kept) and not writer.waiting, 60.0)
    writer.put(event(2))
    await until(lambda: writer.written == len(kept) + 1, 60.0)
    assert (writer.dropped, writer.failures, writer.healthy) == (len(refused), 0, True)
    assert [item.subject for _, item in await store.tail(100)] == ["n0", "n1", "n2"]
    (entry,) = await store.audit(100)
    assert (entry.operation, entry.node, entry.reason) == ("op-1", "n\ufffd2", "a\ufffdb")
    assert len(await store.figures(0.0, 2.0, 100)) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()


def test_a_record_that_is_refused_goes_alone(tmp_path: Path) -> None:
    asyncio.run(check_that_a_refused_record_goes_alone(url(tmp_path / "h.db")))


class Full(HistoryStore):
    """Takes one batch and no other: its disk is full."""

    calls = 0

    async def append(self, *given: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            raise OperationalError("INSERT", None, Exception("database or disk is full"))
        await super().append(*given)


def test_what_is_written_can_be_read_while_nothing_can_be_written(tmp_path: Path) -> None:
    """A full disk: whoever looks at the history to see why must not be told that it is away."""

    async def main() -> None:
        store = Full(url(tmp_path / "h.db"), "c", "c1")
        writer = HistoryWriter(store)
        task = asyncio.create_task(writer.run())
        writer.put(event(1))
        await until(lambda: writer.written == 1)
        writer.put(event(2))
        await until(lambda: writer.failures >= 1)
        assert not writer.healthy
        assert [item.subject for _, item in await writer.tail(10, 0)] == ["n1"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    asyncio.run(main())


def test_putting_never_waits_for_the_database(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "h.db"
        store = HistoryStore(url(path), "c", "c1")
        writer = HistoryWriter(store)
        task = asyncio.create_task(writer.run())
        await until(lambda: writer.healthy)
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("begin exclusive")
        started = time.monotonic()
        for number in range(100):
            writer.put(event(number))
            await asyncio.sleep(0)
        assert time.monotonic() - started < 0.5
        assert writer.written == 0
        blocker.execute("rollback")
        blocker.close()
        await until(lambda: writer.written == 100)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    asyncio.run(main())
