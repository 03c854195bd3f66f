"""Two versions of the code side by side, as real processes: what newer code adds survives, and older code does not lead
over what it must not rewrite."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from controlplane.contract.keys import Keys, decode
from controlplane.contract.records import ControllerRecord, OperationState
from controlplane.contract.status import made_of, mixtures
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import leader_of
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.e2e.test_moves import kfadmin
from tests.e2e.test_operations import under_load

PROMPTS = sample_prompts(4, 300)
OF_A_ROLL = sample_prompts(6, 200)
ROOT = Path(__file__).parents[2]
PACKAGES = ("controlplane", "dataplane", "kernels", "web", "migrations")
ADDED = "zone_policy"
T = TypeVar("T")


def install(folder: Path) -> Path:
    """A copy of the installed packages."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("*.c", "*.h")  # what has been compiled goes with it
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return folder


def another_version(folder: Path, schema: int) -> Path:
    """Change a copy so that it writes one more field in topologies, pipelines, stages and members."""
    for file, line, after in (
        ("topology.py", "    ranks: tuple[Member, ...] = ()\n", "# Stage"),
        ("topology.py", "    move: Move | None = None\n", "# Pipeline"),
        ("topology.py", "    paused: bool = False", "# Topology"),
        ("ids.py", "    incarnation: str\n", "# Member"),
    ):
        path = folder / "controlplane" / "contract" / file
        text = path.read_text()
        at = text.index(line)
        at = text.index("\n", at) + 1
        field = f'    {ADDED}: str = "near"  {after}\n'
        path.write_text(text[:at] + field + text[at:])
    path = folder / "controlplane" / "contract" / "schema.py"
    text = path.read_text()
    assert "\nSCHEMA = 1 " in text
    path.write_text(text.replace("\nSCHEMA = 1 ", f"\nSCHEMA = {schema} "))
    return folder


def controller(cluster: Cluster, code: Path, name: str, log: Path) -> subprocess.Popen[bytes]:
    settings = cluster.local.run_dir.config_file
    command = [sys.executable, "-m", "controlplane.main", "--config", str(settings), "--id", name]
    env = {**os.environ, "PYTHONPATH": str(code)}
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, "--admin-port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=env,
            cwd=code,
        )


async def raw_topology(cluster: Cluster) -> dict[str, Any]:
    config = cluster.local.config
    async with EtcdClient(config.etcd) as client:
        found = await client.get(Keys.of(config).topology(config.group))
        assert found is not None
        value: dict[str, Any] = msgspec.json.decode(found.value)
        return value


def added_everywhere(topology: dict[str, Any]) -> bool:
    pipelines = topology["pipelines"]
    stages = [stage for pipeline in pipelines for stage in pipeline["stages"]]
    members = [member for stage in stages for member in stage["ranks"]]
    return all(ADDED in item for item in (topology, *pipelines, *stages, *members)) and bool(members)


def kept(topology: dict[str, Any]) -> bool:
    """As `added_everywhere`, without members: who is new was written by older code, which knows no such field."""
    pipelines = topology["pipelines"]
    return all(ADDED in item for item in (topology, *pipelines, *(s for p in pipelines for s in p["stages"])))


@pytest.mark.usefixtures("etcd_binary")
@pytest.mark.parametrize("schema", [1, 2])
def test_a_roll_of_controllers_up_and_down_again(tmp_path: Path, schema: int) -> None:
    code = another_version(install(tmp_path / "newer"), schema)
    with Cluster(instances=2, stages=1, controllers=1) as cluster:
        asyncio.run(cluster.references(PROMPTS))
        log = tmp_path / "c9.log"
        newer = controller(cluster, code, "c9", log)
        try:

            async def up(streams: list[Stream]) -> None:
                await until(lambda: sum(len(s.tokens) for s in streams) >= 30, "tokens flow")
                await cluster.wait_for(lambda s: any(c.id == "c9" for c in s.controllers), "c9 is there")
                cluster.local.hold("c1")
                cluster.kill("c1")
                await leads(cluster, "c9")
                cluster.kill("n1")  # the newer code has something to write
                await written(cluster, added_everywhere)

            streams = asyncio.run(while_streaming(cluster, PROMPTS, up))
            asyncio.run(cluster.expect_equal(streams))
            cluster.local.release("c1")  # the older code is back, beside the newer one
            asyncio.run(
                cluster.wait_for(lambda s: all(n.state.value == "green" for n in s.nodes), "all is green")
            )
            before = asyncio.run(raw_topology(cluster))
            assert before["schema"] == schema

            async def down(streams: list[Stream]) -> None:
                await until(lambda: sum(len(s.tokens) for s in streams) >= 30, "tokens flow")
                newer.send_signal(signal.SIGTERM)
                newer.wait(20)
                if schema == 1:
                    await leads(cluster, "c1")
                    cluster.kill("n0")
                    await written(cluster, lambda t: t["counter"] > before["counter"])
                else:
                    refuses = "was written by newer code (schema 2, this is 1)"
                    await cluster.wait_for(
                        lambda s: any(refuses in t for t in s.troubles) and not s.leader,
                        "c1 says why not",
                        20.0,
                    )

            streams = asyncio.run(while_streaming(cluster, PROMPTS, down))
            asyncio.run(cluster.expect_equal(streams))
            after = asyncio.run(raw_topology(cluster))
            assert kept(after), after
            if schema == 1:
                asyncio.run(cluster.wait_all_home())
                assert kept(asyncio.run(raw_topology(cluster)))
            else:
                assert after == before, "older code has written over newer code's value"
        finally:
            newer.kill()
            newer.wait(10)


def versions(cluster: Cluster, names: Iterable[str]) -> set[str]:
    return {version for name, version, _ in made_of(cluster.local.status()) if name in names}


@pytest.mark.usefixtures("etcd_binary")
@pytest.mark.timeout(600)
def test_nodes_and_gateways_are_upgraded_in_place_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages under a running cluster are changed, and changed back, each time followed by a rolling restart. All
    the while there are streams, at first through nodes of two versions."""
    code = install(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # not the code of the directory in which the test runs
    contract = code / "controlplane" / "contract"
    shutil.copytree(contract, tmp_path / "older")
    nodes, gateways = ["n0", "n1", "n2", "n3"], ["g1", "g2"]
    with Cluster(instances=2, stages=2, controllers=1, gateways=2) as cluster:
        asyncio.run(cluster.references(OF_A_ROLL))
        (older,) = versions(cluster, [*nodes, *gateways, "c1"])
        formed = {p.id: p.epoch for p in cluster.local.status().pipelines}

        async def roll(scope: str) -> None:
            words = ("restart", scope, "--timeout", "150")
            done = await asyncio.to_thread(kfadmin, cluster, *words, limit_s=170.0)
            assert done.returncode == 0, done.stdout + done.stderr + cluster.logs()

        async def upgrade() -> None:
            another_version(code, 1)
            await roll("nodes")
            newer = await asyncio.to_thread(versions, cluster, nodes)
            assert len(newer) == 1
            assert newer != {older}
            assert any("mixed versions" in text for text in mixtures(await cluster.status()))
            await roll("gateways")
            assert await asyncio.to_thread(versions, cluster, [*nodes, *gateways]) == newer
            assert await asyncio.to_thread(versions, cluster, ["c1"]) == {older}

        async def downgrade() -> None:
            shutil.copytree(tmp_path / "older", contract, dirs_exist_ok=True)
            await roll("nodes")
            await roll("gateways")
            assert await asyncio.to_thread(versions, cluster, [*nodes, *gateways, "c1"]) == {older}
            assert mixtures(await cluster.status()) == []

        for act in (upgrade, downgrade):
            streams = asyncio.run(under_load(cluster, act, OF_A_ROLL))
            asyncio.run(cluster.expect_equal(streams))
            asyncio.run(cluster.wait_all_home(60.0))
        events = json.loads(kfadmin(cluster, "events", "-o", "json", "--limit", "1000").stdout)
        told = [row["event"] for row in events]
        assert [event["message"] for event in told if event["kind"] == "died"] == []
        recovered = [e for e in told if e["kind"] == "recovered" and e["epoch"] > formed[e["subject"]]]
        assert recovered
        assert [event for event in recovered if not event["details"]["planned"]] == []


@pytest.mark.usefixtures("etcd_binary")
def test_a_restart_that_brings_other_code_than_was_asked_for_fails_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = install(tmp_path / "installed")
    another_version(code, 1)
    with Cluster(instances=2, stages=1, controllers=1) as cluster:
        (installed,) = versions(cluster, ["n0", "n1"])
        monkeypatch.setenv("PYTHONPATH", str(code))  # kfadmin's, and not the host's
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
        done = kfadmin(cluster, "restart", "nodes", "--timeout", "100", limit_s=120.0)
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"n0 came back with code {installed}, not " in done.stdout
        (operation,) = cluster.local.status().operations
        assert operation.state is OperationState.FAILED
        monkeypatch.undo()
        done = kfadmin(cluster, "restart", "nodes", "--timeout", "100", limit_s=120.0)
        assert done.returncode == 0, done.stdout + done.stderr


async def leads(cluster: Cluster, name: str) -> None:
    config = cluster.local.config

    async def leader() -> str:
        async with EtcdClient(config.etcd) as client:
            found = leader_of((await client.get_prefix(Keys.of(config).leader)).items)
        return decode(found.identity, ControllerRecord, found.key).id if found is not None else ""

    await eventually(leader, lambda leader: leader == name)


async def written(cluster: Cluster, condition: Callable[[dict[str, Any]], bool]) -> None:
    await eventually(lambda: raw_topology(cluster), condition)


async def eventually(look: Callable[[], Awaitable[T]], condition: Callable[[T], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition(seen := await look()):
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.05)
