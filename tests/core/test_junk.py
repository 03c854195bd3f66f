"""One list of junk for every reader of what others wrote: values in etcd, reports, frames, files of a run directory.

Whoever reads it tells that it cannot be read, and goes on. And what is taken for good can be led over: it is written
again with nothing lost, and nodes can speak of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from controlplane.contract import api_keys, rpc
from controlplane.contract.config import TimingConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.figures import GatewayReport, Histogram
from controlplane.contract.hosting import WANTED_FILE, Wanted
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import (
    ControllerRecord,
    GatewayRecord,
    Hearing,
    NodeRecord,
    Operation,
    OperationKind,
    ProcessKind,
    Target,
    Waiting,
)
from controlplane.contract.reports import NodeReport, PipelineReport, ReportBatch, TargetReport
from controlplane.contract.revocations import Revocation
from controlplane.contract.schema import SCHEMA, schema_of
from controlplane.contract.topology import Mode, Move, Pipeline, Stage, Topology
from controlplane.etcd.register import holder_of
from controlplane.etcd.values import KeyValue, WatchBatch, WatchEvent
from controlplane.keyspace.view import View
from controlplane.kfadmin.fleet import HostPlan
from controlplane.kfadmin.join import PLAN, read_plan
from controlplane.kfadmin.rundir import Endpoints, RunDir
from controlplane.shell.figures import Recorder
from controlplane.shell.inbox import Inbox
from controlplane.shell.registry import Registry
from controlplane.shell.rpc import ReportServer, _Refused, _Stream
from controlplane.supervisor import ProcessFile, Supervisor, last_line
from dataplane.core.messages import Fence, Ping, ReadyMeta, StepMeta, pack_rows
from dataplane.launcher import Launcher
from dataplane.model.digests import FORMAT, KnownDigest, digest_once, identities
from dataplane.relay import RelayServer
from dataplane.relay import _Node as RelayedNode
from dataplane.relay import _Refused as NotRelayed
from dataplane.transport import frames
from dataplane.transport.hello import Acceptor, HelloError, Initiator
from dataplane.world import World
from tests.core.control.world import make_config
from tests.junk import in_json, in_packed

KEYS = Keys("k")
A, B, C = (Member(f"n{k}", f"i{k}") for k in range(3))
STAGES = (Stage(("n0",), (A,), (C,)), Stage(("n1",), (B,)))
TOPOLOGY = Topology(
    "default",
    7,
    Mode.REPLICATE,
    (Pipeline("p0", 3, STAGES, Move(1, C, "op-1")), Pipeline("p1", 3, STAGES)),
    ("n3",),
    (Member("n9", "z"),),
)
GOOD: dict[str, msgspec.Struct] = {
    KEYS.topology("default"): TOPOLOGY,
    KEYS.node("n0"): NodeRecord(A, "default", 0, 2, "", "", "d", 64, 16, 1, fault_domain={"host": "h"}),
    KEYS.operation("o1"): Operation(
        "o1", OperationKind.RESTART, "nodes", targets=(Target(ProcessKind.NODE, A),), message="1 of 1"
    ),
    KEYS.controller("c1"): ControllerRecord("c1", "h:1", "h:2", 1),
    f"{KEYS.leader}1": ControllerRecord("c1", "h:1", "h:2", 1),
    KEYS.hearing("c1"): Hearing("c1", 4, 7),
    KEYS.gateway("g1"): GatewayRecord("g1", "h:3", 1),
    f"{KEYS.root}waiting/nodes/n0": Waiting("one", "another"),
    KEYS.revoked("t1"): Revocation("t1", "admin", 7, "another"),
}


def batch(revision: int, key: str, value: bytes) -> WatchBatch:
    return WatchBatch(revision, (WatchEvent(key, revision, KeyValue(key, value, 1, revision, 1, 0)),))


@pytest.mark.parametrize("key", GOOD, ids=lambda key: key.removeprefix(KEYS.root))
def test_a_value_in_etcd_ends_nobody_and_what_is_believed_can_be_written_again(key: str) -> None:
    good = encode(GOOD[key])

    async def body() -> None:
        registry, world = Registry(cast(Any, None), KEYS, "default", Inbox()), World(KEYS, "default")
        await registry._apply(batch(10, key, good))
        world.apply(batch(10, key, good))
        for revision, junk in enumerate(in_json(good), 11):
            await registry._apply(batch(revision, key, junk))
            world.apply(batch(revision, key, junk))
            holder_of(junk)
            while registry._inbox.pop() is not None:
                pass
            assert (key in registry.view.unreadable) == (key in world.view.unreadable)
            assert msgspec.json.encode([*registry.troubles(), registry.obstacle])
            if key not in registry.view.unreadable:
                can_be_led_over(registry.view, key, junk)

    asyncio.run(body())


def can_be_led_over(view: View, key: str, value: bytes) -> None:
    found = view.parse(key, value, type(GOOD[key]))
    if key in view.newer:
        assert schema_of(value) > SCHEMA
        return
    again = encode(found, value)
    assert view.parse(key, again, type(found)) == found
    kept, before = (msgspec.json.decode(v, type=dict[str, msgspec.Raw]) for v in (again, value))
    assert ("unknown" in kept) == ("unknown" in before)
    assert bytes(kept.get("unknown", b"")) == bytes(before.get("unknown", b""))
    for pipeline in found.pipelines if isinstance(found, Topology) else ():
        assert frames.encode(ReadyMeta(pipeline.id, Fence(pipeline.epoch, 1), ()))
        assert Fence(found.counter + 1, 1)


def report(member: Member = A) -> NodeReport:
    return NodeReport(
        member,
        1,
        0.0,
        7,
        (PipelineReport("p0", 0, 3, 7, targets=(TargetReport(C, 0),)),),
        counters={"steps": 7},
        troubles=("none",),
    )


def test_reports_of_nodes_are_taken_or_refused() -> None:
    good = rpc.encode(ReportBatch(reports=((0, report()),), beats=(0,)))

    async def body() -> None:
        inbox = Inbox()
        server = ReportServer("t", inbox, TimingConfig())
        await server._take(_Stream(), good)
        refused = 0
        for junk in in_packed(good):
            try:
                await server._take(_Stream(), junk)
            except _Refused:
                refused += 1
            while inbox.pop() is not None:
                pass
        assert refused > 100

    asyncio.run(body())


def test_what_a_relay_gets_is_passed_on_or_refused(tmp_path: Path) -> None:
    good = rpc.encode(ReportBatch(reports=((0, report()),), beats=(0,)))

    async def body() -> None:
        server = RelayServer(msgspec.structs.replace(make_config(), run_dir=str(tmp_path)), "t")
        server._take(RelayedNode(), good)
        refused = 0
        for junk in in_packed(good):
            try:
                server._take(RelayedNode(), junk)
            except NotRelayed:
                refused += 1
        assert refused > 100

    asyncio.run(body())


def test_reports_of_gateways_are_taken_or_refused() -> None:
    recorder = Recorder("t", cast(Any, None), lambda: False)
    good = rpc.encode(GatewayReport("g1", "i", 1.0, 7, Histogram((1.0,), (1, 2)), Histogram((1.0,), (1, 2))))
    assert not isinstance(recorder._take(good, None), str)
    assert sum(isinstance(recorder._take(junk, None), str) for junk in in_packed(good)) > 100


def framed(body: bytes) -> bytes:
    header = frames.HEADER.pack(
        b"KF", frames.VERSION, frames.COVERED, frames.crc32(body, 0), 3, len(body), 0, 0
    )
    return header + body


@pytest.mark.parametrize(
    "meta", [Ping(), ReadyMeta("p0", Fence(3, 1), ()), StepMeta("p0", Fence(3, 2), 3, pack_rows([(1, 0, 4, True)]))]
)  # fmt: skip
def test_a_frame_is_read_or_bad(meta: Any) -> None:
    good = msgspec.msgpack.encode(meta)
    if not isinstance(meta, Ping):
        assert frames.decode(framed(good)).meta == meta
    bad = 0
    for junk in in_packed(good):
        for data in (junk, framed(junk)):
            try:
                frames.decode(data)
            except frames.BadFrame:
                bad += 1
    assert bad > 50


def test_a_hello_is_read_or_refused() -> None:
    ours = Acceptor(b"s", "k", A, b"1" * 32), Initiator(b"s", "k", B, A, b"2" * 32)
    challenge = ours[0].challenge()
    for good, take in (
        (challenge, ours[1].answer),
        (ours[1].answer(challenge), ours[0].admit),
        (ours[0].admit(ours[1].answer(challenge))[2], ours[1].confirm),
    ):
        for junk in in_packed(good):
            with contextlib.suppress(HelloError):
                cast(Callable[[bytes], Any], take)(junk)


class Told:
    """A log."""

    def __init__(self) -> None:
        self.warnings = 0

    def info(self, event: str, **fields: Any) -> None:
        pass

    error = info

    def warning(self, event: str, **fields: Any) -> None:
        self.warnings += 1


def test_a_process_file_is_read_or_left(tmp_path: Path) -> None:
    good = msgspec.json.encode(ProcessFile(os.getpid(), 1.0, 2, 0, -9, "it failed"))
    log = Told()
    supervisor = Supervisor(tmp_path, log, pause_first_s=60.0, pause_max_s=60.0)
    file = tmp_path / "nodes" / "n0.json"
    file.parent.mkdir()
    for junk in in_json(good):
        file.write_bytes(junk)
        supervisor.add("n0", "nodes", lambda _: 0)
        supervisor.remove("n0")
    supervisor.close()
    assert log.warnings > 100


@pytest.mark.parametrize(("name", "good", "read"), [
    ("endpoints.json", Endpoints(("http://h:1",), ("http://h:2",)), RunDir.endpoints),
    (PLAN, HostPlan("a", {}, {"e0": "h"}, 1, 2, True, True, True, ("n0",), ("", ""), (), ()), read_plan),
])  # fmt: skip
def test_what_kfadmin_reads_of_a_directory_is_read_or_refused(
    tmp_path: Path, name: str, good: msgspec.Struct, read: Callable[[RunDir], Any]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    refused = 0
    for junk in in_json(msgspec.json.encode(good)):
        path.write_bytes(junk)
        try:
            read(RunDir(tmp_path))
        except ConfigError:
            refused += 1
    assert refused > 100


def test_a_process_file_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "pids" / "c1.json"
    path.parent.mkdir()
    found = []
    for junk in in_json(msgspec.json.encode(ProcessFile(1, 1.0, 2, 7))):
        path.write_bytes(junk)
        found.append(RunDir(tmp_path).processes("pids"))
    assert found.count({}) > 100


def test_which_nodes_are_wanted_is_read_or_left(tmp_path: Path) -> None:
    config = msgspec.structs.replace(make_config(), run_dir=str(tmp_path))
    launcher = Launcher(config, tmp_path / "cluster.json", ["n0"], "no target", follows=False)
    for junk in in_json(msgspec.json.encode(Wanted(("n0",), ("n9",)))):
        (tmp_path / WANTED_FILE).unlink(missing_ok=True)
        (tmp_path / WANTED_FILE).write_bytes(junk)
        launcher._follow(add=False)


def test_a_digest_is_known_or_computed_anew(tmp_path: Path) -> None:
    model, kept = tmp_path / "model", tmp_path / "digests"
    model.write_bytes(b"weights")
    before = identities([model])
    good = msgspec.json.encode(KnownDigest(FORMAT, ("w",), before, "known"))
    kept.write_bytes(good)
    assert digest_once(lambda: "computed", ["w"], before, kept) == "known"
    found = []
    for junk in in_json(good):
        kept.write_bytes(junk)
        found.append(digest_once(lambda: "computed", ["w"], before, kept))
    assert found.count("computed") > 100


def test_a_file_of_keys_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    record = api_keys.make_key("k", "o", 1, 0, api_keys.KeyLimits())[1]
    path.write_bytes(msgspec.json.encode(api_keys.KeyFile(keys=(record,))))
    path.chmod(0o600)
    good = path.read_bytes()
    refused = 0
    for junk in in_json(good):
        path.write_bytes(junk)
        try:
            api_keys.read_keys(path)
        except ConfigError:
            refused += 1
    assert refused > 100


def test_the_end_of_a_log_is_told_whatever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for junk in in_json(b'{"event":"ready"}'):
        path.write_bytes(junk)
        assert isinstance(last_line(path), str)
