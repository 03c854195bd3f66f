"""Operations under load: whatever an operator does, streams bring exactly the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec
import pytest

from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from dataplane.model.checkpoint import checkpoint_of
from dataplane.shelf import Note, notes
from tests.e2e.cluster import Cluster, until
from tests.e2e.test_moves import kfadmin, serves_nothing

PROMPTS = sample_prompts(8, 200)
NODES = [f"n{k}" for k in range(4)]
CONTROLLERS = ["c1", "c2", "c3"]
GATEWAYS = ["g1", "g2"]
ETCD = ["etcd0", "etcd1", "etcd2"]
PAUSE_MAX_S = 3.0  # without a leader
# Of a request at a planned switch: two that the copy may lack, one that is not full, one that was in flight.
BLOCKS_MISSING_MAX = 4
ENDLESS_TOKENS = 1900  # what fits into the demo model's context


@pytest.fixture(scope="module")
def cluster(etcd_binary: None) -> Iterator[Cluster]:
    """Two instances of two stages, three controllers, three etcd members, two gateways."""
    with Cluster(instances=2, stages=2, controllers=3, etcd_members=3, gateways=2) as running:
        yield running


@pytest.fixture
def home(cluster: Cluster) -> Iterator[Cluster]:
    """The module's cluster with every node at home, before and after the test."""
    asyncio.run(cluster.wait_all_home())
    yield cluster
    for name in (*NODES, *CONTROLLERS, *ETCD, *GATEWAYS, "launcher"):
        cluster.local.release(name)
    asyncio.run(cluster.wait_for(lambda s: s.leader, "somebody leads", 30.0))
    if cluster.local.status().paused:
        assert kfadmin(cluster, "resume").returncode == 0
    asyncio.run(cluster.wait_all_home(60.0))


async def under_load(
    cluster: Cluster, act: Callable[[], Awaitable[None]], prompts: list[Prompt] = PROMPTS
) -> list[Stream]:
    """Run `act` beside streams that never cease: each half of the prompts is asked for again when it has ended."""
    ended: list[Stream] = []
    stop = asyncio.Event()

    async def load(half: list[Prompt]) -> None:
        while not stop.is_set():
            ended.extend(await cluster.resuming.streams(half))

    async def acting() -> None:
        await until(lambda: ended, "streams flow")
        try:
            await act()
        finally:
            stop.set()

    middle = len(prompts) // 2
    async with asyncio.TaskGroup() as group:
        group.create_task(load(prompts[:middle]))
        group.create_task(load(prompts[middle:]))
        group.create_task(acting())
    return ended


async def command(cluster: Cluster, *arguments: str, limit_s: float = 60.0) -> None:
    done = await asyncio.to_thread(kfadmin, cluster, *arguments, limit_s=limit_s)
    assert done.returncode == 0, done.stdout + done.stderr


def reigns(cluster: Cluster, since: datetime) -> list[tuple[datetime, bool]]:
    """When somebody began to lead (True) or ceased to, by the controllers' own logs."""
    found = []
    for name in CONTROLLERS:
        for line in Path(cluster.local.config.run_dir, "logs", f"{name}.log").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a process that is killed leaves half a line
                said = json.loads(line)
                if said["event"] in ("leading", "no longer leading"):
                    found.append((datetime.fromisoformat(said["timestamp"]), said["event"] == "leading"))
    return sorted(pair for pair in found if pair[0] >= since)


def expect_a_leader_throughout(cluster: Cluster, since: datetime, changes: int) -> float:
    """Leadership changed hands so often at least, and the longest time without it was short; seconds."""
    turns = reigns(cluster, since)
    assert [leads for _, leads in turns[:2]] == [False, True], turns  # somebody led in the beginning
    assert sum(leads for _, leads in turns) >= changes, turns
    gaps = [
        (later - at).total_seconds() for (at, leads), (later, _) in itertools.pairwise(turns) if not leads
    ]
    assert turns[-1][1], turns
    assert max(gaps) <= PAUSE_MAX_S, gaps
    return max(gaps)


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before if after.get(name) != before[name]}


def test_rolling_restart_of_everything_under_load(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))
    before, since = home.local.pids(), datetime.now(UTC)

    async def restart() -> None:
        await command(home, "restart", "all", "--timeout", "160", limit_s=170.0)

    streams = asyncio.run(under_load(home, restart))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    assert changed(before, home.local.pids()) == {*NODES, *CONTROLLERS, *GATEWAYS}
    assert blocks_recomputed(home) <= BLOCKS_MISSING_MAX
    expect_a_leader_throughout(home, since, 1)


def blocks_recomputed(cluster: Cluster) -> float:
    """At planned switches, of each of their requests: the median, since one switch may come late on a busy machine, and
    its requests are decoded until it comes."""
    rows = json.loads(kfadmin(cluster, "events", "-o", "json", "--limit", "1000").stdout)
    switches = [row["event"] for row in rows if row["event"]["kind"] == "recovered"]
    planned = [event for event in switches if event["details"]["planned"]]
    assert planned
    missing = [event["details"] for event in planned if event["details"]["requests"]]
    tokens = median(said["tokens_recomputed"] / said["requests"] for said in missing)
    return tokens / cluster.local.config.engine.block_size


def test_leadership_is_transferred_and_no_stream_notices(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))
    epochs, since = {p.id: p.epoch for p in home.local.status().pipelines}, datetime.now(UTC)

    async def transfer() -> None:
        for _ in range(3):
            leader = (await home.status()).leader
            heir = next(name for name in reversed(CONTROLLERS) if name != leader)
            await command(home, "transfer-leader", heir)
            await home.wait_for(lambda s, heir=heir: s.leader == heir, f"{heir} leads", 10.0)

    streams = asyncio.run(under_load(home, transfer))
    asyncio.run(home.expect_equal(streams))
    assert {p.id: p.epoch for p in home.local.status().pipelines} == epochs  # nothing was switched
    expect_a_leader_throughout(home, since, 3)


def test_while_paused_a_dead_node_is_not_repaired_and_resume_repairs_it(home: Cluster) -> None:
    pids = home.local.node_pids()
    assert kfadmin(home, "pause").returncode == 0
    counter = home.local.status().counter
    home.local.hold("n1")
    home.kill("n1")

    def seen(status: ClusterStatus) -> bool:
        return any(n.node == "n1" and n.state is NodeState.RED for n in status.nodes)

    status = asyncio.run(home.wait_for(seen, "n1 is found dead"))
    assert kfadmin(home, "transfer-leader").returncode == 0  # a new leader is paused, too
    status = asyncio.run(home.wait_for(seen, "the new leader finds it dead"))
    assert status.paused
    assert status.counter == counter
    assert status.pipelines[0].state is PipelineState.DOWN
    assert status.pipelines[1].state is PipelineState.UP
    assert status.pipelines[0].stages[1].serving[0].node == "n1"  # nobody has taken its place
    words = kfadmin(home, "status").stdout
    assert "automation is PAUSED" in words
    waiting = kfadmin(home, "drain", "n0", "--detach", "--operation-id", "waits")
    assert "automation is paused" in waiting.stdout
    assert home.local.status().counter == counter
    assert kfadmin(home, "cancel", "waits").returncode == 0
    assert kfadmin(home, "resume").returncode == 0
    asyncio.run(home.wait_for(lambda s: s.pipelines[0].stages[1].borrowed, "n3 is borrowed", 5.0))
    home.local.release("n1")
    asyncio.run(home.wait_all_home())
    assert changed(pids, home.local.node_pids()) == {"n1"}


def test_a_cordoned_node_gets_nothing_new_and_keeps_what_it_serves(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))

    async def cordon() -> None:
        await command(home, "cordon", "n1")
        before = await home.status()
        home.local.hold("n3")
        home.kill("n3")  # n1 would have to be borrowed

        def down(status: ClusterStatus) -> bool:
            return status.pipelines[1].state is PipelineState.DOWN

        await home.wait_for(down, "nobody is borrowed")
        status = await home.status()
        assert status.pipelines[0].epoch == before.pipelines[0].epoch
        assert [n.serving for n in status.nodes if n.node == "n1"] == [("p0/1",)]
        assert [n.cordoned for n in status.nodes if n.node == "n1"] == [True]
        await command(home, "uncordon", "n1")
        await home.wait_for(lambda s: s.pipelines[1].state is PipelineState.DEGRADED, "n1 is borrowed", 5.0)
        home.local.release("n3")

    streams = asyncio.run(under_load(home, cordon))
    asyncio.run(home.expect_equal(streams))


def test_a_drain_does_not_wait_for_generations_that_take_for_ever(home: Cluster) -> None:
    """Streams as long as the model allows; the drain is over in seconds, and they go on with the same tokens."""
    prompts = sample_prompts(6, ENDLESS_TOKENS)
    wanted = asyncio.run(first_tokens(home, prompts, 600))

    async def drain(streams: list[Stream]) -> None:
        await until(lambda: all(len(s.tokens) >= 100 for s in streams), "tokens flow")
        began, held = time.monotonic(), [len(s.tokens) for s in streams]
        await command(home, "drain", "n0")
        took_s = time.monotonic() - began
        left = min(ENDLESS_TOKENS - len(s.tokens) for s in streams)
        assert took_s < 15.0
        assert left > 300, f"{left} tokens were left: {took_s} s, {held}"
        assert serves_nothing(await home.status(), "n0")

    try:
        got = asyncio.run(first_tokens(home, prompts, 600, drain))
    finally:
        assert kfadmin(home, "undrain", "n0").returncode == 0
    for mine, other in zip(got, wanted, strict=True):
        assert mine.tokens[:600] == other.tokens[:600]


async def first_tokens(
    cluster: Cluster,
    prompts: list[Prompt],
    count: int,
    act: Callable[[list[Stream]], Awaitable[None]] | None = None,
) -> list[Stream]:
    """The first `count` tokens of each stream at least; then the clients hang up."""
    streams = [Stream(prompt) for prompt in prompts]
    task = asyncio.create_task(cluster.generator.streams(prompts, streams))
    try:
        if act is not None:
            await act(streams)
        await until(lambda: all(len(s.tokens) >= count for s in streams), f"{count} tokens each", 60.0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return streams


def test_etcd_and_the_launcher_are_restarted_under_load(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))
    before = home.local.pids()

    async def restart() -> None:
        await command(home, "restart", "etcd")
        await command(home, "restart", "launcher")
        # It returns when all is done.
        assert changed(before, home.local.pids()) == {*ETCD, "launcher", "relay"}
        await command(home, "replace", "n2")

    streams = asyncio.run(under_load(home, restart))
    asyncio.run(home.expect_equal(streams))
    assert changed(before, home.local.pids()) == {*ETCD, "launcher", "relay", "n2"}


def test_check_says_what_would_be_refused_and_changes_nothing(home: Cluster) -> None:
    counter = home.local.status().counter
    assert kfadmin(home, "check", "drain", "n1").returncode == 0
    assert kfadmin(home, "check", "replace", "n1").returncode == 0
    assert kfadmin(home, "check", "quorum").returncode == 0
    refused = kfadmin(home, "check", "replace", "n1", "--with", "n2")
    assert refused.returncode == 3
    assert "fail" in refused.stdout
    plan = kfadmin(home, "restart", "all", "--dry-run", "-o", "json")
    assert plan.returncode == 0
    steps = json.loads(plan.stdout)["plan"]
    assert len(steps) == len(NODES) + len(CONTROLLERS) + len(GATEWAYS)
    assert home.local.status().counter == counter


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def test_the_audit_has_what_kfadmin_does_to_keys_and_tokens(home: Cluster) -> None:
    for words in (("keys", "create", "alice"), ("keys", "revoke", "alice"), ("token", "create", "bob")):
        role = ("--role", "viewer") if words[0] == "token" else ()
        done = kfadmin(home, *words, *role)
        assert (done.returncode, "no line of it" in done.stderr) == (0, False), done.stderr

    def told() -> bool:
        found = kfadmin(home, "audit", "-o", "json").stdout
        lines = [(line["kind"], line["reason"].split(" of ")[0]) for line in json.loads(found)]
        wanted = ("create-key", "revoke-key", "create-token")
        return [line for line in lines if line[0] in wanted] == [(kind, "kfadmin") for kind in wanted]

    asyncio.run(until(told, "the audit has a line of each"))


def test_a_blank_machine_gets_its_weights_from_a_peer(home: Cluster, tmp_path: Path) -> None:
    """A node with no checkpoint and nothing but the secret takes a dead one's place under load."""
    asyncio.run(home.references(PROMPTS))
    shutil.copy(home.local.config.secret_file, tmp_path / "secret")
    blank = msgspec.structs.replace(home.local.config, run_dir=str(tmp_path), model=str(tmp_path / "nothing"))
    (tmp_path / "blank.json").write_bytes(msgspec.json.encode(blank))
    command = [
        sys.executable,
        "-m",
        "dataplane.main",
        "--config",
        str(tmp_path / "blank.json"),
        "--node",
        "n3",
    ]
    processes: list[subprocess.Popen[bytes]] = []

    async def replace() -> None:
        home.local.hold("n3")
        home.kill("n3")
        await home.wait_for(lambda s: s.pipelines[1].stages[1].borrowed, "n1 is borrowed", 5.0)
        processes.append(start(command, tmp_path / "log"))

        def serves(status: ClusterStatus) -> bool:
            node = next(n for n in status.nodes if n.node == "n3")
            return node.pid == processes[0].pid and node.serving == ("p1/1",)

        await home.wait_for(serves, f"the blank n3 serves; {(tmp_path / 'log').read_text()}", 60.0)

    try:
        streams = asyncio.run(under_load(home, replace))
    finally:
        for process in processes:
            process.terminate()
            process.wait(10)
    asyncio.run(home.expect_equal(streams))
    (fetched,) = (tmp_path / "weights").glob("stage1of2-*[!k]")
    assert not any(path.suffix == ".partial" for path in (tmp_path / "weights").iterdir())
    assert (fetched / "model.safetensors").stat().st_size > 1_000_000
    whole = checkpoint_of(Path(home.local.config.model), None)
    assert whole, "the test's model is not known"
    assert notes(fetched) == {blank.group: Note(blank.model, whole)}  # as its peer registered
