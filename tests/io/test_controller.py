"""Real kf-controller processes on a real etcd. Nodes are gRPC clients that register and report as nodes do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec

from controlplane.contract import rpc
from controlplane.contract.auth import create_secret, derive
from controlplane.contract.config import ClusterConfig, TimingConfig
from controlplane.contract.ids import Member, new_incarnation
from controlplane.contract.keys import Keys, decode, encode
from controlplane.contract.records import ControllerRecord, NodeRecord
from controlplane.contract.reports import LinkReport, NodeReport, PipelineReport, TargetReport
from controlplane.contract.topology import Mode, Topology
from controlplane.core.events import OperationGone, WriteConflict, WriteDone, WriteTopology, WriteUnknown
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.register import Registration
from controlplane.etcd.values import Delete
from controlplane.history.store import HistoryStore
from controlplane.history.writer import HistoryWriter
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from tests.io.etcd_server import EtcdMember, etcd_member

HEARTBEAT_S = 0.1
FORM_LIMIT_S = 15.0


@dataclass
class Node:
    """The outside of a node: its record in etcd, and a stream of reports to every controller."""

    record: NodeRecord
    cluster: Cluster
    down_links: set[Member] = field(default_factory=set)
    seq: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    registration: Registration | None = None

    def start(self) -> None:
        client, keys = self.cluster.client, self.cluster.keys
        name = self.record.member.node
        self.registration = Registration(client, keys.node(name), encode(self.record), 5)
        self.tasks = [
            asyncio.create_task(self.registration.run()),
            asyncio.create_task(self._report_to_all()),
        ]

    def die(self) -> None:
        """As kill -9 does: the streams break at once, the lease stays until it expires."""
        for task in self.tasks:
            task.cancel()
        for call in self.calls:
            call.cancel()

    def report(self) -> NodeReport:
        topology, me = self.cluster.topology, self.record.member
        served = []
        for pipeline in topology.pipelines if topology else ():
            for index in pipeline.stages_of(me):
                targets = tuple(TargetReport(target, 0) for target in pipeline.stages[index].replicas)
                served.append(
                    PipelineReport(pipeline.id, pipeline.epoch, index, last_step=0, targets=targets)
                )
        self.seq += 1
        return NodeReport(
            member=me,
            seq=self.seq,
            unix_s=time.time(),
            progress=self.seq,
            pipelines=tuple(served),
            links=tuple(LinkReport(peer, up=False, silent_s=0.0, reason="reset") for peer in self.down_links),
            blocks_total=64,
            topology_counter=topology.counter if topology else 0,
            counters={"steps_total": self.seq},
        )

    async def _report_to_all(self) -> None:
        streams: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for address in await self.cluster.controller_addresses():
                    if address not in streams or streams[address].done():
                        streams[address] = asyncio.create_task(self._report_to(address))
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            for task in streams.values():
                task.cancel()

    async def _report_to(self, address: str) -> None:
        token = derive(self.cluster.secret, "grpc")
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with grpc.aio.insecure_channel(address) as channel:
                method = channel.stream_stream(rpc.CONTROL_REPORT, rpc.encode, rpc.decode_ack)
                call = method(metadata=(("authorization", f"Bearer {token}"),))
                self.calls.append(call)
                while True:
                    await call.write(self.report())
                    await asyncio.sleep(HEARTBEAT_S)


@dataclass
class Cluster:
    config: ClusterConfig
    folder: Path
    etcd: EtcdMember
    client: EtcdClient
    secret: bytes
    keys: Keys = field(default_factory=lambda: Keys("kevlarflow"))
    topology: Topology | None = None
    counters: list[int] = field(default_factory=list)
    controllers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    http: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=5, trust_env=False))

    def start_controller(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "controlplane.main", "--config", str(self.folder / "cluster.json")]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--id", name, "--admin-port", "0"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self.controllers[name] = process
        return process

    def start_node(self, index: int) -> Node:
        config = self.config
        record = NodeRecord(
            member=Member(f"n{index}", new_incarnation()),
            group=config.group,
            stage=index % config.stages,
            num_stages=config.stages,
            link_address="127.0.0.1:1",
            rpc_address="127.0.0.1:1",
            weights_digest=f"digest{index % config.stages}",
            pool_blocks=64,
            block_size=16,
            pid=os.getpid(),
        )
        node = self.nodes[f"n{index}"] = Node(record, self)
        node.start()
        return node

    async def controller_addresses(self) -> list[str]:
        return [record.rpc_address for record in (await self.records()).values()]

    async def records(self) -> dict[str, ControllerRecord]:
        with contextlib.suppress(Exception):  # etcd away: what was known is still good
            found = (await self.client.get_prefix(self.keys.controllers, timeout_s=0.5)).items
            self._records = {
                (r := decode(v.value, ControllerRecord, k)).id: r
                for k, v in found.items()
                if self.controllers.get(k.rpartition("/")[2]) is not None
            }
        return getattr(self, "_records", {})

    async def follow(self) -> None:
        key = self.keys.topology(self.config.group)
        async for batch in self.client.watch_prefix(key):
            for event in batch.events:
                if event.now is not None:
                    with contextlib.suppress(Exception):  # the test writes junk there, too
                        self.topology = decode(event.now.value, Topology, key)
                        self.counters.append(self.topology.counter)

    async def ask(self, controller: str, method: str, path: str, **more: Any) -> httpx.Response:
        record = (await self.records())[controller]
        headers = {"authorization": f"Bearer {derive(self.secret, 'admin')}"}
        url = f"http://{record.admin_address}{path}"
        return await self.http.request(method, url, headers=headers, **more)

    async def status(self, controller: str) -> dict[str, Any]:
        return (await self.ask(controller, "GET", "/admin/v1/status")).json()

    async def leader(self) -> str:
        """Who leads, by what a living controller answers."""
        for name, process in self.controllers.items():
            if process.poll() is None and name in await self.records():
                with contextlib.suppress(httpx.HTTPError, KeyError):  # its registration may lapse just now
                    leader = (await self.status(name))["leader"]
                    if leader and self.controllers[leader].poll() is None:
                        return leader
        return ""

    async def settled(self) -> bool:
        """Every controller that was started sees every other, and all nodes serve."""
        names = sorted(self.controllers)
        if not self.formed() or sorted(await self.records()) != names:
            return False
        statuses = [await self.status(name) for name in names]
        return all(
            [c["id"] for c in status["controllers"]] == names
            and status["available"]
            and all(node["state"] == "green" for node in status["nodes"])
            for status in statuses
        )

    def formed(self) -> bool:
        return self.topology is not None and all(p.up and p.epoch for p in self.topology.pipelines)

    def events(self) -> list[tuple[str, str, str]]:
        with contextlib.closing(sqlite3.connect(self.folder / "history.db")) as db:
            return db.execute("select kind, subject, recorded_by from events order by id").fetchall()

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in self.folder.glob("c*.log"))


async def until(
    condition: Callable[[], Any], limit_s: float, what: str, cluster: Cluster | None = None
) -> Any:
    """Wait for a condition (plain or async) to be true; its value."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        value = await value if asyncio.iscoroutine(value) else value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}\n{cluster and cluster.logs()}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(folder: Path, etcd: EtcdMember, controllers: int, **more: Any) -> AsyncIterator[Cluster]:
    """A run_dir, `controllers` candidates, and a client that follows the topology."""
    timing = TimingConfig(form_grace_s=3.0)
    config = ClusterConfig(
        run_dir=str(folder), model="none", etcd=(etcd.endpoint,), instances=2, stages=2, timing=timing, **more
    )
    (folder / "cluster.json").write_bytes(msgspec.json.encode(config))
    async with EtcdClient(config.etcd) as client:
        cluster = Cluster(config, folder, etcd, client, create_secret(config.secret_file))
        follower = asyncio.create_task(cluster.follow())
        try:
            for index in range(controllers):
                cluster.start_controller(f"c{index + 1}")
            yield cluster
        finally:
            follower.cancel()
            for node in cluster.nodes.values():
                node.die()
            for process in cluster.controllers.values():
                process.kill()
                process.wait(10)
            await cluster.http.aclose()
        for word in ('"level": "error"', "Traceback", "never retrieved", "was destroyed"):
            assert word not in cluster.logs(), cluster.logs()


def scenario(tmp_path: Path, body: Callable[[Cluster], Coroutine[Any, Any, None]], **more: Any) -> None:
    """Run `body` on a cluster of four nodes whose topology has formed."""

    async def main(etcd: EtcdMember) -> None:
        async with running(tmp_path, etcd, **more) as cluster:
            for index in range(4):
                cluster.start_node(index)
            await until(cluster.settled, FORM_LIMIT_S, "the topology formed, everybody is known", cluster)
            await body(cluster)

    with etcd_member(tmp_path / "etcd") as etcd:
        asyncio.run(main(etcd))


def test_the_leader_is_killed_and_the_other_goes_on(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        other = "c2" if leader == "c1" else "c1"
        for name in (leader, other):
            status = await cluster.status(name)
            assert status["answered_by"] == name
            assert status["available"]
            assert status["leader"] == leader
            assert [node["state"] for node in status["nodes"]] == ["green"] * 4
            assert {c["id"]: c["leader"] for c in status["controllers"]} == {leader: True, other: False}
        metrics = (await cluster.ask(leader, "GET", "/metrics")).text
        assert "kevlarflow_is_leader 1.0" in metrics
        assert 'kevlarflow_node_state{node="n0",state="green"} 1.0' in metrics
        assert 'kevlarflow_epoch{pipeline="p0"}' in metrics
        assert 'kevlarflow_replica_lag_tokens{pipeline="p1",stage="1"}' in metrics
        assert 'kevlarflow_steps_total{node="n3"}' in metrics
        assert "kevlarflow_etcd_watch_age_seconds" in metrics
        assert "kevlarflow_is_leader 0.0" in (await cluster.ask(other, "GET", "/metrics")).text

        before = cluster.counters[-1]
        killed_at = time.monotonic()
        cluster.controllers[leader].kill()

        async def taken_over() -> bool:
            return (await cluster.status(other))["leader"] == other

        await until(taken_over, 4, "the other controller leads", cluster)
        assert time.monotonic() - killed_at < 4

        # The new leader decides: a node dies, its peer is borrowed, in a new epoch of the same count.
        died_at = time.monotonic()
        victim = cluster.nodes["n1"]
        cluster.nodes["n0"].down_links.add(victim.record.member)
        victim.die()

        def borrowed() -> bool:
            topology = cluster.topology
            return topology is not None and topology.counter > before and len(topology.serving("n3")) == 2

        await until(borrowed, 4, "n3 is borrowed for n1", cluster)
        assert time.monotonic() - died_at < 2
        assert cluster.formed()
        assert cluster.counters == sorted(set(cluster.counters)), "a counter was used twice, or went back"

        def recorded() -> bool:
            rows = cluster.events()  # that p0 was formed is an epoch, too: the one after the death is meant
            died = ("died", "n1", other)
            return died in rows and ("epoch", "p0", other) in rows[rows.index(died) :]

        await until(recorded, 5, "history has it", cluster)
        rows = cluster.events()
        assert [by for kind, _, by in rows if kind == "leader"] == [leader, other]
        assert ("died", "n1", other) in rows
        answer = (await cluster.ask(other, "GET", "/admin/v1/events?limit=500")).json()["events"]
        assert [(row["kind"], row["subject"]) for row in answer] == [row[:2] for row in rows]

    scenario(tmp_path, body, controllers=2)


def test_sigterm_hands_over_at_once_and_waits_for_no_stream(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        other = "c2" if leader == "c1" else "c1"
        record = (await cluster.records())[leader]
        headers = {"authorization": f"Bearer {derive(cluster.secret, 'admin')}"}
        url = f"http://{record.admin_address}/admin/v1/stream"
        async with cluster.http.stream("GET", url, headers=headers) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("event: status")
            process = cluster.controllers[leader]
            asked_at = time.monotonic()
            process.send_signal(signal.SIGTERM)
            await until(lambda: process.poll() is not None, 2, "the controller ended", cluster)
            ended_s = time.monotonic() - asked_at
            assert process.returncode == 0, cluster.logs()
        assert ended_s < 2

        async def taken_over() -> bool:
            return (await cluster.status(other))["leader"] == other

        # Well before the lease of two seconds would have ended.
        await until(taken_over, 1.5, "the other controller leads", cluster)
        assert leader not in {c["id"] for c in (await cluster.status(other))["controllers"]}

    scenario(tmp_path, body, controllers=2)


def test_operations_and_junk(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        await until(cluster.leader, 5, "a leader is known", cluster)
        # Junk in etcd and on the wire is counted, and nothing stops.
        await cluster.client.put(cluster.keys.node("n9"), b"{nonsense")
        await cluster.client.put(cluster.keys.controllers + "c9", b"\xff")
        await cluster.client.put(cluster.keys.operation("o9"), b"[]")
        address = (await cluster.records())["c1"].rpc_address
        good = (("authorization", f"Bearer {derive(cluster.secret, 'grpc')}"),)
        wrong = (("authorization", f"Bearer {derive(cluster.secret, 'admin')}"),)
        assert await refusal(address, good, b"\x93nonsense") == grpc.StatusCode.INVALID_ARGUMENT
        assert await refusal(address, ()) == grpc.StatusCode.UNAUTHENTICATED
        assert await refusal(address, wrong) == grpc.StatusCode.UNAUTHENTICATED

        async def counted() -> bool:
            text = (await cluster.ask("c1", "GET", "/metrics")).text
            return "kevlarflow_etcd_junk_values_total 3.0" in text and "refused_total 3.0" in text

        await until(counted, 5, "junk is counted", cluster)

        def body_of(node: str, name: str, **more: Any) -> dict[str, Any]:
            return {"json": {"id": name, "kind": "drain", "node": node, **more}}

        url = "/admin/v1/operations"
        refused = await cluster.ask("c1", "POST", url, **body_of("n77", "op-1"))
        assert refused.status_code == 409, refused.text
        dry = await cluster.ask("c1", "POST", url, **body_of("n1", "op-2", dry_run=True))
        assert (dry.status_code, dry.json()["accepted"]) == (200, False), dry.text
        assert dry.json()["plan"]
        assert await cluster.client.get(cluster.keys.operation("op-2")) is None
        first = await cluster.ask("c1", "POST", url, **body_of("n1", "op-2"))
        assert (first.status_code, first.json()["accepted"]) == (200, True), first.text
        again = await cluster.ask("c1", "POST", url, **body_of("n1", "op-2"))
        assert again.json()["operation"]["created_unix_s"] == first.json()["operation"]["created_unix_s"]
        other = await cluster.ask("c1", "POST", url, **body_of("n2", "op-2"))
        assert other.status_code == 409
        assert "op-2 was used" in other.json()["checks"][0]["message"]

        def cordoned() -> bool:
            return cluster.topology is not None and "n1" in cluster.topology.cordoned

        await until(cordoned, 5, "the leader acts on the operation", cluster)
        cancelled = await cluster.ask("c1", "DELETE", f"{url}/op-2")
        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert (await cluster.ask("c1", "DELETE", f"{url}/never")).status_code == 404

        def audited() -> bool:
            with contextlib.closing(sqlite3.connect(cluster.folder / "history.db")) as db:
                actions = db.execute("select action, operation_id from operations_audit").fetchall()
            return {("refused", "op-1"), ("submitted", "op-2"), ("cancelled", "op-2")} <= set(actions)

        await until(audited, 5, "the audit has it", cluster)

    scenario(tmp_path, body, controllers=1)


async def refusal(address: str, metadata: Any, message: bytes | None = None) -> grpc.StatusCode:
    """How a stream ends. Without a message: grpc.aio calls a write to a refused stream an internal error."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(rpc.CONTROL_REPORT)(metadata=metadata)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            if message is not None:
                await call.write(message)
            await call.read()
        return await call.code()


def test_etcd_away_and_back(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        await until(cluster.leader, 5, "a leader is known", cluster)
        before = cluster.topology
        cluster.etcd.pause()

        async def etcd_is_missed() -> bool:
            status = await cluster.status("c1")
            assert status["available"], "streams go on, and the status says so"
            return status["etcd_age_s"] > 2.5

        await until(etcd_is_missed, 8, "the age of what is known grows", cluster)
        request = {"id": "op-1", "kind": "drain", "node": "n1"}
        answer = await cluster.ask("c1", "POST", "/admin/v1/operations", json=request)
        assert answer.status_code == 503
        assert (await cluster.ask("c1", "GET", "/readyz")).status_code == 200
        assert [n["state"] for n in (await cluster.status("c1"))["nodes"]] == ["green"] * 4
        cluster.etcd.resume()
        await until(cluster.leader, 10, "somebody leads again", cluster)

        async def fresh() -> bool:
            return (await cluster.status("c1"))["etcd_age_s"] < 1.5

        await until(fresh, 10, "etcd is heard again", cluster)
        assert before is not None
        assert cluster.topology is not None
        assert cluster.topology.counter >= before.counter
        # Nobody died of it.
        assert [p.epoch for p in cluster.topology.pipelines] == [p.epoch for p in before.pipelines]
        process = cluster.controllers["c1"]
        assert process.poll() is None

        # Neither etcd nor a locked database holds an exit up.
        audits = [{"id": f"op-{number}", "kind": "drain", "node": "n77"} for number in range(3)]
        with contextlib.closing(sqlite3.connect(cluster.folder / "history.db", isolation_level=None)) as db:
            db.execute("begin exclusive")
            for audit in audits:
                await cluster.ask("c1", "POST", "/admin/v1/operations", json=audit)
            cluster.etcd.pause()
            process.send_signal(signal.SIGTERM)
            await until(lambda: process.poll() is not None, 2.5, "the controller ended", cluster)
        assert process.returncode == 0
        cluster.etcd.resume()

    scenario(tmp_path, body, controllers=1)


def test_without_a_database_the_cluster_still_forms(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        answer = await cluster.ask("c1", "GET", "/admin/v1/events")
        assert answer.status_code == 503
        assert "history database" in answer.json()["error"]["message"]
        metrics = (await cluster.ask("c1", "GET", "/metrics")).text
        assert "kevlarflow_history_healthy 0.0" in metrics

    missing = tmp_path / "missing" / "history.db"
    scenario(tmp_path, body, controllers=1, database_url=f"sqlite+aiosqlite:///{missing}")


def test_bad_settings_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"run_dir": "/x"}')
    command = [sys.executable, "-m", "controlplane.main", "--config", str(path), "--id", "c1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "cluster.json: Object missing required field `model`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_leader_does_no_harm_when_it_wakes(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        other = "c2" if leader == "c1" else "c1"
        cluster.controllers[leader].send_signal(signal.SIGSTOP)

        async def leads() -> bool:
            return (await cluster.status(other))["leader"] == other

        await until(leads, 4, "the other controller leads", cluster)
        before = cluster.counters[-1]
        # While the old leader sleeps a node dies, and comes back as a fresh process.
        cluster.nodes["n2"].down_links.add(cluster.nodes["n3"].record.member)
        cluster.nodes["n3"].die()
        await until(lambda: cluster.counters[-1] > before, 4, "n3 is replaced", cluster)
        cluster.controllers[leader].send_signal(signal.SIGCONT)

        async def awake() -> bool:
            status = await cluster.status(leader)
            return status["leader"] == other and status["counter"] == cluster.counters[-1]

        await until(awake, 5, "the old leader has caught up", cluster)
        metrics = (await cluster.ask(leader, "GET", "/metrics")).text
        assert "kevlarflow_is_leader 0.0" in metrics
        assert cluster.counters == sorted(set(cluster.counters))
        assert cluster.formed()

    scenario(tmp_path, body, controllers=2)


def test_a_write_after_the_leadership_is_gone_changes_nothing(tmp_path: Path) -> None:
    """The guard: the candidate's own clock still says that it leads, etcd knows better."""

    async def main(etcd: EtcdMember) -> None:
        keys = Keys("guard")
        history = HistoryWriter(HistoryStore(f"sqlite+aiosqlite:///{tmp_path / 'h.db'}", "guard", "c1"))
        async with EtcdClient([etcd.endpoint]) as client:
            inbox = Inbox()
            performer = Performer(client, keys, "default", inbox, history)
            task = asyncio.create_task(performer.run())
            topology = Topology("default", 1, Mode.REPLICATE, ())
            write = WriteTopology(topology, 0)
            await performer.put(write)  # nobody leads
            assert await inbox.get(2) == WriteConflict()
            leadership = performer.leadership = await Election(client, keys.leader, b"{}").campaign()
            # Deleted behind its back: the write may well be sent before its own watch tells it so.
            await client.txn([], [Delete(leadership.key)])
            await performer.put(write)
            assert await inbox.get(2) == WriteConflict()
            assert await client.get(keys.topology("default")) is None
            await leadership.resign()
            performer.leadership = await Election(client, keys.leader, b"{}").campaign()
            await performer.put(write)
            answer = await inbox.get(2)
            assert isinstance(answer, WriteDone)
            await performer.put(write)  # the compare-and-swap: the key is no longer absent
            assert await inbox.get(2) == WriteConflict()
            await performer.put(WriteTopology(topology, answer.mod_revision))
            assert isinstance(await inbox.get(2), WriteDone)
            etcd.pause()
            await performer.put(WriteTopology(topology, answer.mod_revision))
            assert isinstance(await inbox.get(5), WriteUnknown | WriteConflict)
            etcd.resume()
            task.cancel()
            await performer.leadership.resign()

    with etcd_member(tmp_path / "etcd") as etcd:
        asyncio.run(main(etcd))


def test_the_inbox_is_bounded_and_keeps_order() -> None:
    async def main() -> None:
        inbox = Inbox(len_max=2)
        await inbox.put(OperationGone("1"))
        await inbox.put(OperationGone("2"))
        waiting = asyncio.create_task(inbox.put(OperationGone("4")))
        await asyncio.sleep(0)
        assert not waiting.done()
        inbox.put_own(OperationGone("3"))  # our own answers never wait
        got = [await inbox.get(1) for _ in range(4)]
        assert got == [OperationGone(str(number)) for number in (1, 2, 3, 4)]
        assert await inbox.get(0.01) is None
        await waiting

    asyncio.run(main())
