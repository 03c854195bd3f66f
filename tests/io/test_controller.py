"""Real kf-controller processes on a real etcd. Nodes are gRPC clients that register and report as nodes do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from controlplane.contract import rpc
from controlplane.contract.auth import derive
from controlplane.contract.keys import Keys
from controlplane.contract.topology import Mode, Topology
from controlplane.core.events import (
    HeartbeatsReceived,
    OperationGone,
    WriteConflict,
    WriteDone,
    WriteTopology,
    WriteUnknown,
)
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.values import Delete
from controlplane.history.store import HistoryStore
from controlplane.history.writer import HistoryWriter
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from tests.io.controllers import Cluster, scenario, until
from tests.io.etcd_server import EtcdMember, etcd_member


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

        def told() -> bool:
            return ("leader", leader) in {(kind, by) for kind, _, by in cluster.events()}

        await until(
            told, 10, "history has who leads: what waits for its database dies with the process", cluster
        )
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
        for node in cluster.nodes.values():
            node.lag_tokens = 1_000_000  # no move ends before its operation is cancelled

        async def behind() -> bool:
            pipelines = (await cluster.status("c1"))["pipelines"]
            return all(stage["lag_tokens"] > 0 for pipeline in pipelines for stage in pipeline["stages"])

        await until(behind, 5, "every copy is behind", cluster)
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

        async def audited() -> bool:
            entries = (await cluster.ask("c1", "GET", "/admin/v1/audit")).json()["entries"]
            actions = {(entry["action"], entry["operation"]) for entry in entries}
            return {("refused", "op-1"), ("submitted", "op-2"), ("cancelled", "op-2")} <= actions

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
            assert await inbox.get(2) == WriteConflict(write)
            leadership = performer.leadership = await Election(client, keys.leader, b"{}").campaign()
            # Deleted behind its back: the write may well be sent before its own watch tells it so.
            await client.txn([], [Delete(leadership.key)])
            await performer.put(write)
            assert await inbox.get(2) == WriteConflict(write)
            assert await client.get(keys.topology("default")) is None
            await leadership.resign()
            performer.leadership = await Election(client, keys.leader, b"{}").campaign()
            await performer.put(write)
            answer = await inbox.get(2)
            assert isinstance(answer, WriteDone)
            await performer.put(write)  # the compare-and-swap: the key is no longer absent
            assert await inbox.get(2) == WriteConflict(write)
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


def test_what_etcd_tells_does_not_compete_with_reports_for_room() -> None:
    """A watch that did would get one event in for each message of each of hundreds of streams."""

    async def main() -> None:
        inbox = Inbox(len_max=2)
        await inbox.put(*[HeartbeatsReceived(())] * 3)
        more = asyncio.create_task(inbox.put(HeartbeatsReceived(())))
        told = asyncio.create_task(inbox.put_watched(OperationGone("1")))
        await asyncio.sleep(0)
        assert (more.done(), told.done()) == (False, True)
        await inbox.put_watched(OperationGone("2"))
        waiting = asyncio.create_task(inbox.put_watched(OperationGone("3")))
        await asyncio.sleep(0)
        assert not waiting.done(), "its own bound"
        assert [inbox.pop() for _ in range(3)] == [HeartbeatsReceived(())] * 3
        await more
        assert [inbox.pop(), inbox.pop()] == [OperationGone("1"), OperationGone("2")]
        await waiting

    asyncio.run(main())


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
