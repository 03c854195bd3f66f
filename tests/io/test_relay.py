"""The relay of a host as a real process, between real reporters and the controllers' end of reports."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import grpc
import msgspec
import pytest

from controlplane.contract import rpc
from controlplane.contract.auth import create_secret, derive
from controlplane.contract.config import ClusterConfig, TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import ControllerRecord
from controlplane.contract.reports import REPORT_SCHEMA, NodeReport, PipelineReport, ReportBatch
from controlplane.core.events import CoreEvent, HeartbeatsReceived, ReportReceived, ReportStreamBroken
from controlplane.etcd.client import EtcdClient
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer
from dataplane.core.paths import Paths
from dataplane.main import _relay
from dataplane.report_stream import SOCKET, SOCKET_PATH_BYTES_MAX, relay_address
from dataplane.reporter import Reporter
from tests.io.etcd_proxy import EtcdProxy, eventually
from tests.io.etcd_server import EtcdMember, etcd_member

LIMIT_S = 20.0
NODES = 3
OWN = (("grpc.use_local_subchannel_pool", 1),)
USUAL = TimingConfig()
# Where a test says how soon something is: a busy machine is late by less than half of such a heartbeat.
UNHURRIED = TimingConfig(heartbeat_s=1.0, suspect_after_s=6.0, dead_after_s=12.0)


@dataclass
class Node:
    """The reporting part of a node: what it says is up to the test."""

    member: Member
    reporter: Reporter = field(init=False)
    progress: int = 0
    leaving: bool = False
    last_step: int = 0

    def report(self, seq: int, sent: int) -> tuple[NodeReport, int]:
        pipelines = (PipelineReport("p0", 1, 0, self.last_step),)
        return NodeReport(self.member, seq, time.time(), self.progress, pipelines, leaving=self.leaving), sent


@dataclass
class Controller:
    """A candidate's ear: everything that it hears, with the time."""

    name: str
    server: ReportServer
    address: str
    events: list[tuple[float, CoreEvent]] = field(default_factory=list)

    @property
    def broken(self) -> list[Member]:
        return [event.member for _, event in self.events if isinstance(event, ReportStreamBroken)]

    def heard_at(self, member: Member) -> list[float]:
        return [
            at
            for at, event in self.events
            if (isinstance(event, HeartbeatsReceived) and member in event.members)
            or (isinstance(event, ReportReceived) and event.report.member == member)
        ]

    def reports_of(self, member: Member) -> list[NodeReport]:
        reports = [event.report for _, event in self.events if isinstance(event, ReportReceived)]
        return [report for report in reports if report.member == member]


@dataclass
class Host:
    config: ClusterConfig
    client: EtcdClient
    token: str
    controllers: list[Controller] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    relay: subprocess.Popen[bytes] | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def start_relay(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dataplane.relay", "--config", str(self.run_dir / "cluster.json")]
        with (self.run_dir / "relay.log").open("ab") as log:
            self.relay = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.relay

    def start_nodes(self) -> None:
        records = {c.name: ControllerRecord(c.name, c.address, "", 1) for c in self.controllers}
        for index in range(NODES):
            node = Node(Member(f"n{index}", "a"))
            node.reporter = Reporter(
                self.token,
                self.config.timing.heartbeat_s,
                node.report,
                relay=relay_address(self.run_dir),
            )
            node.reporter.set_controllers(records)
            self.nodes.append(node)

    async def up(self) -> subprocess.Popen[bytes]:
        """The nodes report through a relay, the one that is returned. It listens before they start: on a busy machine
        that takes so long that they would try again only 10 s later."""
        relay = self.start_relay()
        await eventually((self.run_dir / SOCKET).exists, LIMIT_S, "the relay listens")
        self.start_nodes()
        await self.until_up()
        return relay

    async def until_up(self) -> None:
        """The relay's word is heard everywhere, and nobody needs a stream of his own."""
        await eventually(self.relayed, LIMIT_S, "the relay speaks for all")

    def relayed(self) -> bool:
        return all(c.server.streams == NODES and c.server.senders == 1 for c in self.controllers) and not any(
            node.reporter._lines for node in self.nodes
        )

    def on_their_own(self) -> bool:
        return all(len(node.reporter._lines) == len(self.controllers) for node in self.nodes)

    def unharmed(self) -> None:
        """No controller was told of an end, nor missed a node for so long that it would take it for dead."""
        assert [c.broken for c in self.controllers] == [[] for _ in self.controllers]
        for controller in self.controllers:
            for node in self.nodes:
                at = controller.heard_at(node.member)
                assert max(b - a for a, b in pairwise(at)) < self.config.timing.dead_after_s

    def log(self) -> str:
        path = self.run_dir / "relay.log"
        return path.read_text() if path.exists() else ""


async def listen(controller: Controller, inbox: Inbox) -> None:
    while True:
        event = await inbox.get(1.0)
        if event is not None:
            controller.events.append((time.monotonic(), event))


@asynccontextmanager
async def host(folder: Path, etcd: EtcdMember, timing: TimingConfig) -> AsyncIterator[Host]:
    config = ClusterConfig(str(folder), "none", (etcd.endpoint,), instances=1, stages=NODES, timing=timing)
    (folder / "cluster.json").write_bytes(msgspec.json.encode(config))
    token = derive(create_secret(config.secret_file), "grpc")
    tasks = []
    async with EtcdClient(config.etcd) as client:
        found = Host(config, client, token)
        for index in range(2):
            inbox = Inbox()
            server = ReportServer(token, inbox, timing)
            controller = Controller(f"c{index}", server, await server.start("127.0.0.1"))
            await register(found, controller.name, controller.address)
            found.controllers.append(controller)
            tasks.append(asyncio.create_task(listen(controller, inbox)))
        try:
            yield found
        except AssertionError as error:
            raise AssertionError(f"{error}\n{found.log()}") from error
        finally:
            for node in found.nodes:
                await node.reporter.close()
            if found.relay is not None:
                found.relay.kill()
                found.relay.wait(10)
            for controller in found.controllers:
                await controller.server.stop()
            for task in tasks:
                task.cancel()


async def register(host: Host, name: str, address: str) -> None:
    record = ControllerRecord(name, address, "", 1)
    await host.client.put(Keys(host.config.cluster).controller(name), encode(record))


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMember]:
    with etcd_member(tmp_path_factory.mktemp("etcd")) as member:
        yield member


def on_host(
    folder: Path,
    etcd: EtcdMember,
    body: Callable[[Host], Awaitable[None]],
    timing: TimingConfig = USUAL,
) -> None:
    folder.mkdir(exist_ok=True)

    async def go() -> None:
        async with asyncio.timeout(90), host(folder, etcd, timing) as found:
            await body(found)

    asyncio.run(go())


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_a_host_is_one_stream_for_each_controller_and_news_pass_at_once(
    tmp_path: Path, etcd: EtcdMember
) -> None:
    async def body(host: Host) -> None:
        await host.up()
        assert (host.run_dir / SOCKET).stat().st_mode & 0o777 == 0o600

        def told(node: Node, step: int) -> bool:
            return all(c.reports_of(node.member)[-1].pipelines[0].last_step == step for c in host.controllers)

        node, passed = host.nodes[1], []
        for step in range(1, 21):
            node.last_step = step
            node.reporter.kick()
            await eventually(lambda: told(node, node.last_step), LIMIT_S, "the news are here")
            sent = host.controllers[0].reports_of(node.member)[-1].unix_s
            at = next(
                at
                for at, event in host.controllers[0].events
                if isinstance(event, ReportReceived)
                and event.report.member == node.member
                and event.report.pipelines[0].last_step == step
            )
            passed.append(at - (sent - time.time() + time.monotonic()))
        assert sorted(passed)[len(passed) // 2] < host.config.timing.heartbeat_s / 2
        assert host.relayed()
        host.nodes.remove(node)
        await node.reporter.close()  # as the kernel does for a killed process: its stream ends
        for controller in host.controllers:
            await eventually(
                lambda c=controller: c.broken == [node.member], LIMIT_S, "its end is told at once"
            )

    on_host(tmp_path, etcd, body, UNHURRIED)


def test_a_killed_relay_is_nobodys_death_and_a_new_one_takes_over(tmp_path: Path, etcd: EtcdMember) -> None:
    async def body(host: Host) -> None:
        relay = await host.up()
        relay.kill()
        relay.wait(10)
        await eventually(host.on_their_own, LIMIT_S, "everybody reports by himself")
        assert (host.run_dir / SOCKET).exists()  # stale: it is in nobody's way
        host.start_relay()
        await host.until_up()
        host.unharmed()

    on_host(tmp_path, etcd, body, UNHURRIED)


def test_a_stopped_relay_is_left_and_believed_again_after_a_while(tmp_path: Path, etcd: EtcdMember) -> None:
    async def body(host: Host) -> None:
        relay = await host.up()
        seen = [len(c.reports_of(n.member)) for c, n in product(host.controllers, host.nodes)]
        with stopped(relay):
            for node in host.nodes:
                node.reporter.kick()  # it takes that in, but passes it on when it is old
            await eventually(host.on_their_own, LIMIT_S, "everybody reports by himself")
            for node in host.nodes:
                node.reporter.kick()
            await eventually(
                lambda: all(
                    len(c.reports_of(n.member)) > before + 1
                    for (c, n), before in zip(product(host.controllers, host.nodes), seen, strict=True)
                ),
                LIMIT_S,
                "whole reports of everybody",
            )
        await host.until_up()
        host.unharmed()
        for controller in host.controllers:
            for node in host.nodes:
                seqs = [report.seq for report in controller.reports_of(node.member)]
                assert seqs == sorted(seqs), "an old report came after a newer one"

    on_host(tmp_path, etcd, body, UNHURRIED)


def test_a_relay_that_is_told_to_end_hands_its_nodes_over(
    tmp_path: Path, etcd: EtcdMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(host: Host) -> None:
        relay = await host.up()
        alone: list[bool] = []  # whether a node reported by itself to everybody when the relay let go of it

        def note(paths: Paths, broken: Callable[[float], None], now: float) -> None:
            alone.append(len(paths.own) == len(host.controllers))
            broken(now)

        for node in host.nodes:
            paths = node.reporter._paths
            monkeypatch.setattr(paths, "broken", partial(note, paths, paths.broken))
        relay.terminate()
        assert await asyncio.to_thread(relay.wait, 10) == 0
        assert host.on_their_own()
        assert [c.broken for c in host.controllers] == [[], []]
        assert len(alone) >= NODES
        assert all(alone)

    on_host(tmp_path, etcd, body)


def test_a_controller_that_only_the_relay_cannot_reach_is_reported_to_directly(
    tmp_path: Path, etcd: EtcdMember
) -> None:
    """All that the relay has sent to it is stuck. The nodes' own connections take another way."""

    async def body(host: Host) -> None:
        first, second = host.controllers
        way = FirstStuck(int(first.address.rpartition(":")[2]))
        await way.listen()
        await register(host, first.name, way.endpoint)
        host.start_relay()
        await eventually(lambda: way.connections, LIMIT_S, "the relay has connected")
        first.address = way.endpoint
        host.start_nodes()
        await host.until_up()
        way.stuck = True
        await eventually(
            lambda: all(list(n.reporter._lines) == [way.endpoint] for n in host.nodes),
            LIMIT_S,
            "everybody reports by himself, to that one only",
        )
        await host.until_up()  # over a new connection
        assert second.broken == []
        assert first.broken == []
        await way.close()

    on_host(tmp_path, etcd, body, UNHURRIED)


class FirstStuck(EtcdProxy):
    """On its first connection nothing passes any more once that is `stuck`."""

    connections = 0
    stuck = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.connections > 1:
            await super()._accept(reader, writer)
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not self.stuck:
                writer.write(data)
        writer.transport.abort()


def test_nodes_of_another_schema_and_strangers_are_refused(tmp_path: Path, etcd: EtcdMember) -> None:
    async def body(host: Host) -> None:
        await host.up()
        me = NodeReport(Member("n9", "z"), 1, 0.0, 0)
        newer, older = (ReportBatch(((0, me),), schema=REPORT_SCHEMA + by) for by in (1, -1))
        for token, batch, code in (
            (host.token, newer, grpc.StatusCode.FAILED_PRECONDITION),
            (host.token, older, grpc.StatusCode.FAILED_PRECONDITION),
            (host.token, ReportBatch(beats=(0,)), grpc.StatusCode.FAILED_PRECONDITION),
            (host.token, {"no": "batch"}, grpc.StatusCode.FAILED_PRECONDITION),
            ("wrong", None, grpc.StatusCode.UNAUTHENTICATED),  # refused before it says a word
        ):
            async with grpc.aio.insecure_channel(relay_address(host.run_dir), options=OWN) as channel:
                call = channel.stream_stream(rpc.CONTROL_REPORT, rpc.encode, rpc.decode_ack)(
                    metadata=(("authorization", f"Bearer {token}"),)
                )
                if batch is not None:
                    await call.write(batch)
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await call.read()
                assert refusal.value.code() is code
        seen = [len(c.reports_of(host.nodes[0].member)) for c in host.controllers]
        host.nodes[0].reporter.kick()
        for controller, before in zip(host.controllers, seen, strict=True):
            await eventually(
                lambda c=controller, before=before: len(c.reports_of(host.nodes[0].member)) > before,
                LIMIT_S,
                "what the relay was told later is here",
            )
            assert controller.heard_at(me.member) == []

    on_host(tmp_path, etcd, body)


def test_a_long_path_is_no_obstacle_and_a_second_relay_of_a_host_says_so(
    tmp_path: Path, etcd: EtcdMember
) -> None:
    folder = tmp_path / ("deep" * 30)

    async def body(host: Host) -> None:
        assert len(str(host.run_dir / SOCKET)) > SOCKET_PATH_BYTES_MAX
        first = await host.up()
        second = host.start_relay()
        try:
            assert await asyncio.to_thread(second.wait, 10) == 2
            assert f"another relay runs in {host.run_dir}" in host.log()
            assert host.relayed()
        finally:
            host.relay = first

    on_host(folder, etcd, body, UNHURRIED)


def test_a_socket_that_cannot_be_made_is_said_in_words(tmp_path: Path, etcd: EtcdMember) -> None:
    async def body(host: Host) -> None:
        in_the_way = host.run_dir / SOCKET
        in_the_way.mkdir()
        (in_the_way / "file").touch()
        assert await asyncio.to_thread(host.start_relay().wait, 10) == 2
        assert f"cannot make the socket {in_the_way}" in host.log()

    on_host(tmp_path, etcd, body)


def test_a_node_whose_run_directory_cannot_be_opened_reports_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)  # a long path is opened, to have a short name for it
    config = ClusterConfig(str(folder), "none", ("127.0.0.1:1",), instances=1, stages=1)
    assert _relay(config) == ""
    folder.mkdir()
    assert _relay(config).startswith("unix:")
