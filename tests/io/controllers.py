"""Real kf-controller processes on a real etcd, and the outsides of nodes: gRPC clients that register and report."""

from __future__ import annotations

import asyncio
import contextlib
import os
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
from controlplane.contract.reports import LinkReport, NodeReport, PipelineReport, ReportBatch, TargetReport
from controlplane.contract.topology import Topology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.register import Registration
from tests.io.etcd_server import EtcdMember, etcd_member

HEARTBEAT_S = 0.1
FORM_LIMIT_S = 15.0


@dataclass
class Node:
    """The outside of a node: its record in etcd, and a stream of reports to every controller."""

    record: NodeRecord
    cluster: Cluster
    down_links: set[Member] = field(default_factory=set)
    lag_tokens: int = 0  # of every copy that it makes
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
        """As kill -9 does: the streams break at once, the lease stays until it expires, and nobody renews it."""
        for task in self.tasks:
            task.cancel()
        if self.registration is not None and self.registration._keeper is not None:
            self.registration._keeper._task.cancel()
        for call in self.calls:
            call.cancel()

    def report(self) -> NodeReport:
        topology, me = self.cluster.topology, self.record.member
        served = []
        for pipeline in topology.pipelines if topology else ():
            for index in pipeline.stages_of(me):
                targets = tuple(
                    TargetReport(target, self.lag_tokens) for target in pipeline.stages[index].replicas
                )
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
                for name, record in (await self.cluster.records()).items():
                    address, stream = record.rpc_address, streams.get(record.rpc_address)
                    if (name, self.record.member.node) in self.cluster.unheard:
                        if stream is not None:
                            stream.cancel()
                    elif stream is None or stream.done():
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
                    await call.write(ReportBatch(reports=((0, self.report()),)))
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
    unheard: set[tuple[str, str]] = field(default_factory=set)  # controllers and nodes: no reports pass
    http: httpx.AsyncClient = field(
        default_factory=lambda: httpx.AsyncClient(timeout=5, trust_env=False, verify=False)
    )

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
            if not db.execute("select 1 from sqlite_master where name = 'events'").fetchall():
                return []  # a controller answers before its database is ready
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
