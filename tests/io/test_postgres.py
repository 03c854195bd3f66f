"""The history on a real PostgreSQL: tables, triggers, a server that stops under load, migrations."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from msgspec.structs import replace
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import migrations
from controlplane.contract.audit import Action
from controlplane.contract.auth import Caller, Role
from controlplane.contract.errors import Unavailable
from controlplane.contract.keys import Keys
from controlplane.contract.records import Asked, Operation, OperationKind, OperationState
from controlplane.contract.topology import Mode, Topology
from controlplane.core.events import Record, WriteDone, WriteOperation, WriteTopology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.history import schema
from controlplane.history.store import Audit, HistoryStore, submitted
from controlplane.history.tables import metadata
from controlplane.history.writer import HistoryWriter
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from tests.io.etcd_server import EtcdMember, etcd_member, free_ports
from tests.io.test_history import check_that_a_refused_record_goes_alone, event, until

START_LIMIT_S = 60.0
CALL_LIMIT_S = 0.5  # of the writer, where a server hangs
PASSWORD = "not in the settings"
OPERATION = Operation(id="op-1", kind=OperationKind.DRAIN, node="n2")


class Server:
    """A PostgreSQL of the test's own, on loopback, of a user that is not root."""

    def __init__(self, folder: Path, programs: Path, user: str) -> None:
        (self.port,) = free_ports(1)
        self.url = f"postgresql+asyncpg://kf@127.0.0.1:{self.port}/postgres"
        self._data, self._programs = folder / "data", programs
        self._log = folder / "log"
        self._user = pwd.getpwnam(user) if os.geteuid() == 0 else None
        password = folder / "password"
        password.write_text(PASSWORD)
        if self._user is not None:
            for path in (folder, password):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "--username=kf", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {self.port}\nlisten_addresses = '127.0.0.1'\n")
            settings.write(f"unix_socket_directories = '{folder}'\nfsync = off\n")

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", f"--timeout={START_LIMIT_S:.0f}", f"--log={self._log}")

    def stop(self) -> None:
        """At once, as by a crash: connections break in the middle of what they do."""
        self._run("pg_ctl", "stop", "--mode=immediate", "--wait")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """As a host that hangs: connections stand and new ones are accepted by the kernel, and nobody answers."""
        postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGSTOP)  # first, so that it makes no more of them
        every = [postmaster, *_children(postmaster)]
        try:
            for pid in every[1:]:
                _send(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in every:
                _send(pid, signal.SIGCONT)

    def _run(self, program: str, *words: str) -> None:
        who = {} if self._user is None else {"user": self._user.pw_uid, "group": self._user.pw_gid}
        done = subprocess.run(
            [str(self._programs / program), f"--pgdata={self._data}", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT, timeout=2 * START_LIMIT_S, check=False, cwd="/", **who,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stdout!r}"


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(") ")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def programs() -> Path | None:
    """Where initdb is: on PATH, or where Debian has it."""
    found = shutil.which("initdb")
    if found is not None and (Path(found).parent / "pg_ctl").exists():
        return Path(found).parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    where = programs()
    if where is None:
        pytest.skip("PostgreSQL is not installed (package postgresql)")
    if importlib.util.find_spec("asyncpg") is None:
        pytest.skip("asyncpg is not installed (pip install 'kevlarflow[postgres]')")
    folder = Path(tempfile.mkdtemp(prefix="kf-pg-"))
    try:
        made = Server(folder, where, "nobody")
        made.start()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PGPASSWORD", PASSWORD)  # or a file that PGPASSFILE names
                yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def url(server: Server) -> str:
    """Of a database without tables."""

    async def clear() -> None:
        engine = schema.make_engine(server.url)
        async with begun(engine) as connection:
            await connection.execute(text("drop schema public cascade"))
            await connection.execute(text("create schema public"))
        await engine.dispose()

    asyncio.run(clear())
    return server.url


def begun(engine: AsyncEngine) -> AbstractAsyncContextManager[AsyncConnection]:
    return engine.begin()


def test_what_is_written_comes_back_and_the_audit_stays(url: str) -> None:
    async def main() -> None:
        stores = [HistoryStore(url, "c", f"c{index}") for index in range(3)]
        await asyncio.gather(*(store.upgrade() for store in stores))  # controllers that start together
        store = stores[0]
        written = [event(number) for number in range(10)]
        alice = Caller("alice", Role.OPERATOR, "10.0.0.7")
        await store.append([*written, Audit(Action.SUBMITTED, OPERATION, 1.0, 12, alice, "a disk fails")])
        everything = await store.tail(100)
        assert [item for _, item in everything] == written
        assert await stores[1].tail(100, after=everything[6][0]) == everything[7:]
        (entry,) = await store.audit(10)
        assert (entry.who, entry.reason, entry.epoch_before) == ("alice", "a disk fails", 12)
        engine = schema.make_engine(url)
        for change in ("update operations_audit set who = 'nobody'", "delete from operations_audit"):
            with pytest.raises(DBAPIError, match="append-only"):
                async with engine.begin() as connection:
                    await connection.execute(text(change))
        await engine.dispose()
        assert await store.prune(4) == 6
        assert [item for _, item in await store.tail(100)] == written[6:]
        assert await store.audit(10) == [entry]
        for one in stores:
            await one.close()

    asyncio.run(main())


def test_the_first_line_about_an_operation_that_all_write_at_once_is_kept_once(url: str) -> None:
    async def main() -> None:
        stores = [HistoryStore(url, "c", f"c{index}") for index in range(3)]
        await stores[0].upgrade()
        lines = [
            submitted(
                replace(OPERATION, id=f"op-{number}", asked=Asked("alice", "operator", "10.0.0.7", "", 12))
            )
            for number in range(100)
        ]
        told = [line for line in lines if line is not None]
        await asyncio.gather(*(store.audit(1) for store in stores))  # they are connected
        # In another order each: neither waits for what the other one has.
        await asyncio.gather(*(store.append(told[k:] + told[:k]) for k, store in enumerate(stores)))
        await asyncio.gather(stores[0].append(told), stores[1].append(told[::-1]))
        assert sorted(entry.operation for entry in await stores[0].audit(200)) == sorted(
            f"op-{number}" for number in range(100)
        )
        for one in stores:
            await one.close()

    asyncio.run(main())


def test_migrations_go_forward_and_back_and_agree_with_the_tables(url: str) -> None:
    def migrate(connection: Connection, move: Callable[..., None], revision: str) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        move(config, revision)

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async def main() -> None:
        engine = schema.make_engine(url)

        async def go(move: Callable[..., None], revision: str) -> None:
            async with engine.begin() as connection:
                await connection.run_sync(migrate, move, revision)

        await go(command.upgrade, "0001")
        old = "insert into operations_audit values (1, 'c', 1.0, 'op-1', 'done', 'drain', 'n2', '', '', 'c1')"
        async with engine.begin() as connection:
            await connection.execute(text(old))
        await go(command.upgrade, "head")
        async with engine.begin() as connection:
            assert await connection.run_sync(differences) == []
        store = HistoryStore(url, "c", "c1")
        assert [(entry.operation, entry.who) for entry in await store.audit(10)] == [("op-1", "")]
        await store.close()
        await go(command.downgrade, "0001")
        async with engine.begin() as connection:
            found = await connection.execute(text("select operation_id, action from operations_audit"))
            assert [tuple(row) for row in found] == [("op-1", "done")]
            # The trigger is gone with its release.
            await connection.execute(text("delete from operations_audit"))
        await go(command.upgrade, "head")
        await engine.dispose()

    asyncio.run(main())


def test_a_record_that_is_refused_goes_alone(url: str) -> None:
    asyncio.run(check_that_a_refused_record_goes_alone(url))


class Cutting:
    """Between a client and the server: passes everything on, but for the answer to one COMMIT."""

    def __init__(self, server_port: int) -> None:
        self.cut_next = False
        self.cuts = 0
        self._server_port = server_port
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> int:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        losing = asyncio.Event()
        ways = [
            asyncio.create_task(self._asked(reader, to_server, losing)),
            asyncio.create_task(self._answered(from_server, writer, losing)),
        ]
        self._links.update(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for task in ways:
            task.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, to_server):
            end.transport.abort()

    async def _asked(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
            if self.cut_next and b"COMMIT" in data:
                self.cut_next = False
                losing.set()
            writer.write(data)
            await writer.drain()

    async def _answered(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
            if losing.is_set():
                assert b"COMMIT" in data  # the server has done it
                self.cuts += 1
                return
            writer.write(data)
            await writer.drain()


def test_a_commit_whose_answer_is_lost_is_not_done_twice(server: Server, url: str) -> None:
    async def main() -> None:
        proxy = Cutting(server.port)
        async with proxy as port:
            store = HistoryStore(url.replace(f":{server.port}/", f":{port}/"), "c", "c1")
            writer = HistoryWriter(store)
            running = asyncio.create_task(writer.run())
            writer.put(event(0))
            await until(lambda: writer.written == 1, 60.0)
            for first in (1, 4):
                proxy.cut_next = True
                writer.put(event(first))
                writer.put(Audit(Action.SUBMITTED, Operation(f"op-{first}", OperationKind.PAUSE), 1.0))
                await until(lambda: not proxy.cut_next, 60.0)
                writer.put(event(first + 1))
                writer.put(event(first + 2))
                await until(lambda: not writer.waiting, 60.0)
            assert (proxy.cuts, writer.failures) == (2, 2)
            assert [item.subject for _, item in await store.tail(100)] == [f"n{n}" for n in range(7)]
            assert [entry.operation for entry in await store.audit(100)] == ["op-1", "op-4"]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await store.close()

    asyncio.run(main())


def test_a_server_that_crashes_under_load_loses_nothing(server: Server, url: str) -> None:
    async def main() -> None:
        store = HistoryStore(url, "c", "c1")
        writer = HistoryWriter(store)
        running = asyncio.create_task(writer.run())
        sent = 0

        def put(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                writer.put(event(sent))
                if sent % 50 == 0:
                    writer.put(Audit(Action.SUBMITTED, Operation(f"op-{sent}", OperationKind.PAUSE), 1.0))
                sent += 1

        put(100)
        await until(lambda: writer.written >= 102, 60.0)
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        while not stopping.done():  # batches are under way when it goes
            put(5 if sent < 400 else 0)  # all are read at once in the end
            await asyncio.sleep(0.005)
        await stopping
        put(500)
        await until(lambda: writer.failures > 0, 60.0)
        with pytest.raises(Unavailable):
            await writer.tail(10, 0)
        await asyncio.to_thread(server.start)
        put(50)
        await until(lambda: not writer.waiting, 60.0)
        assert writer.dropped == 0
        assert sent < 1000
        subjects = [item.subject for _, item in await store.tail(1000)]
        assert subjects == [f"n{number}" for number in range(sent)]  # each once, in order
        told = [entry.operation for entry in await store.audit(1000)]
        assert told == [f"op-{number}" for number in range(0, sent, 50)]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await store.close()

    asyncio.run(main())


def test_a_server_that_hangs_delays_no_decision_and_loses_nothing(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute of it in small: the server hangs for longer than a call may take."""
    monkeypatch.setattr("controlplane.history.writer.CALL_LIMIT_S", CALL_LIMIT_S)
    before, during = 40, 60  # decisions

    async def main(etcd: EtcdMember) -> None:
        keys, inbox = Keys("c"), Inbox()
        store = HistoryStore(url, "c", "c1")
        await store.upgrade()
        writer = HistoryWriter(store)
        async with EtcdClient([etcd.endpoint]) as client:
            performer = Performer(client, keys, "default", inbox, writer)
            tasks = [asyncio.create_task(job) for job in (writer.run(), performer.run())]
            performer.leadership = await Election(client, keys.leader, b"{}", ttl_s=60).campaign()
            revision = 0

            async def decide(number: int) -> None:
                """Tell of something, write a topology for it, and end an operation; etcd has both when it returns."""
                nonlocal revision
                asked = Asked("alice", Role.OPERATOR.value, "10.0.0.7")
                operation = Operation(
                    f"op-{number}", OperationKind.PAUSE, state=OperationState.DONE, asked=asked
                )
                await performer.put(Record(event(number)))
                await performer.put(
                    WriteTopology(Topology("default", number + 1, Mode.REPLICATE, ()), revision)
                )
                await performer.put(WriteOperation(operation, 0))
                # Nobody wakes the server before all are done: to wait for it would be to wait in vain.
                topology, ended = await inbox.get(20), await inbox.get(20)
                assert isinstance(topology, WriteDone)
                assert isinstance(ended, WriteDone)
                revision = topology.mod_revision

            await decide(0)
            await until(lambda: writer.written == 3, 60.0)
            for number in range(1, before):  # batches are under way when it stops
                await decide(number)
            with server.frozen():
                for number in range(before, before + during):
                    await decide(number)
                # It tries again, and says that nobody answers.
                await until(lambda: writer.failures >= 2, 30.0)
                with pytest.raises(Unavailable):
                    await writer.tail(10, 0)
                assert writer.waiting >= 3 * during
            await until(lambda: not writer.waiting, 60.0)
            assert writer.dropped == 0
            every = range(before + during)
            assert [item.subject for _, item in await writer.tail(1000, 0)] == [f"n{n}" for n in every]
            told = [(one.operation, one.action) for one in await writer.audit(1000, 0, "")]
            assert told == [(f"op-{n}", action) for n in every for action in (Action.SUBMITTED, Action.DONE)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await performer.leadership.resign()
            await store.close()

    with etcd_member(tmp_path / "etcd") as etcd:
        asyncio.run(main(etcd))
