"""Nodes that are not dead: stopped, hung, ten times slower, wrong. Found within 2 s, and no stream notices."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors import safe_open

from controlplane.contract.config import EngineConfig
from controlplane.contract.events import Event, EventKind
from controlplane.contract.status import ClusterStatus, NodeState, NodeStatus
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from controlplane.kfadmin.up import demo_model
from tests.e2e.cluster import ASK_S, WAIT_S, Cluster, until, while_streaming
from tests.e2e.faults import frozen_thread, overwrite, thread_times, threads_named, throttled

# Each fault has a node of its own: a relapse makes a probation longer, and the tests wait for its end.
STOPPED, SLOW, HUNG, CORRUPTED = "n1", "n2", "n5", "n6"
FOUND_S = 2.0
SEEN_S = 10.0
HAS_NOT_ENDED = "its computation has not ended"
FOUND = (EventKind.SUSPECTED, EventKind.DIED)
DECODE = sample_prompts(12, 400)
# A pass over such a prompt at once is for certain taken for long, and computed by a thread of its own.
LONG = EngineConfig(max_batch_tokens=2048)
PREFILL = sample_prompts(12, 100, words=1000)
# No node has blocks of these: what it has is not computed again, and a short rest would not be long enough to hang.
UNSEEN = [replace(prompt, text=f"Unseen until now. {prompt.text}") for prompt in PREFILL]


@pytest.fixture(scope="module")
def cluster(etcd_binary: None) -> Iterator[Cluster]:
    """Not the shared one, whose nodes are to have no past: each relapse makes a probation longer."""
    with Cluster(engine=LONG) as running:
        yield running


def node(status: ClusterStatus, name: str) -> NodeStatus:
    return next(n for n in status.nodes if n.node == name)


def peer(name: str) -> str:
    """The node of the same stage in the other one of two instances of four."""
    return f"n{(int(name[1:]) + 4) % 8}"


def borrowed(status: ClusterStatus, victim: str) -> bool:
    instance, stage = divmod(int(victim[1:]), 4)
    pipeline = next(p for p in status.pipelines if p.id == f"p{instance}")
    return pipeline.stages[stage].serving[0].node == peer(victim)


def health(cluster: Cluster) -> tuple[int, str]:
    headers = {"authorization": f"Bearer {cluster.local.api_key}"}
    answer = httpx.get(
        f"{cluster.local.gateway_url}/health", headers=headers, timeout=5.0, trust_env=False, verify=False
    )
    return answer.status_code, answer.text


async def found(
    cluster: Cluster, victim: str, words: str, since_unix_s: float, began_unix_s: float | None = None
) -> str:
    """The victim is found out in time, and its peer serves for it; what the history says of it (`told`)."""
    status = await cluster.wait_for(lambda s: borrowed(s, victim), "its peer serves for it")
    assert node(status, victim).state is not NodeState.GREEN, "it is trusted again at once"
    # The gateway has a watch of its own on the topology.
    said = f"stage {int(victim[1:]) % 4} is served by {peer(victim)} for {victim}"
    async with asyncio.timeout(SEEN_S):
        while said not in (answer := await asyncio.to_thread(health, cluster))[1]:
            assert borrowed(await cluster.status(), victim), (
                f"it is home again, and {answer[1]} was all that was said"
            )
    assert answer[0] == 200
    assert '"degraded"' in answer[1]

    return await told(cluster, victim, words, since_unix_s, began_unix_s=began_unix_s)


async def told(
    cluster: Cluster,
    victim: str,
    words: str,
    since_unix_s: float,
    limit_s: float = FOUND_S,
    began_unix_s: float | None = None,
) -> str:
    """What the history says of the victim since `began_unix_s`, which has these words; the first word of it came
    `limit_s` after `since_unix_s` at most."""
    began = since_unix_s if began_unix_s is None else began_unix_s

    def look() -> list[Event]:
        with cluster.local.admin() as admin:
            events = [row.event for row in admin.events(limit=100)]
        return [e for e in events if e.subject == victim and e.unix_s >= began and e.kind in FOUND]

    said, deadline = "", time.monotonic() + WAIT_S
    while words not in said:  # the history is written after the status, and later on a busy machine
        assert time.monotonic() < deadline, f"nothing says {words!r}: {said}"
        await asyncio.sleep(ASK_S)
        events = await asyncio.to_thread(look)
        said = "; ".join(event.message for event in events)
    took_s = min(event.unix_s for event in events) - since_unix_s
    assert took_s <= limit_s, f"found after {took_s:.2f} s: {said}"
    return said


async def flowing(streams: list[Stream], tokens: int) -> None:
    await until(lambda: sum(len(s.tokens) for s in streams) >= tokens, "tokens flow")


def test_a_stopped_node(home: Cluster) -> None:
    asyncio.run(home.references(DECODE))

    async def stop(streams: list[Stream]) -> None:
        await flowing(streams, 120)
        since = time.time()
        home.kill(STOPPED, signal.SIGSTOP)
        try:
            await found(home, STOPPED, "silent", since)
        finally:
            home.kill(STOPPED, signal.SIGCONT)

    streams = asyncio.run(while_streaming(home, DECODE, stop))
    asyncio.run(home.expect_equal(streams))


def test_a_node_ten_times_slower(home: Cluster) -> None:
    """It is demoted, not killed: a planned move, and a way back."""
    asyncio.run(home.references(DECODE))
    pids = home.local.node_pids()

    async def slow(streams: list[Stream]) -> None:
        await flowing(streams, 120)
        since = time.time()
        with throttled(home.node_pid(SLOW), 0.1):
            said = await found(home, SLOW, "on probation", since)
            assert "died" not in said

    streams = asyncio.run(while_streaming(home, DECODE, slow))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home(60.0))
    assert home.local.node_pids() == pids


def test_a_hung_node(home: Cluster) -> None:
    """Its loop answers, its computation never ends. It gets a fresh process."""
    pid = home.node_pid(HUNG)
    before = thread_times(pid)
    asyncio.run(home.references(PREFILL))
    # Short computations run on the loop, which would hang with them, and silence would be seen.
    spent = {tid: seconds - before.get(tid, 0.0) for tid, seconds in thread_times(pid).items() if tid != pid}
    computes = max(spent, key=lambda tid: spent[tid])
    assert spent[computes] >= 0.02, f"no thread of {HUNG} computes: {spent}"

    async def hang(streams: list[Stream]) -> None:
        frozen = time.time()
        with frozen_thread(pid, computes):
            await until(lambda: all(s.sent for s in streams), "all are sent")
            await found(home, HUNG, HAS_NOT_ENDED, time.time(), frozen)
        await home.wait_for(lambda s: node(s, HUNG).pid not in (0, pid), "a fresh process is there")

    streams = asyncio.run(while_streaming(home, UNSEEN, hang))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home(60.0))


def test_a_node_hung_in_its_first_step(etcd_binary: None) -> None:
    """Nothing is known yet of how long its steps take, and of a team's threads only one stands still. Its process ends
    although a thread of it waits for ever."""
    with Cluster(engine=EngineConfig(threads=2), instances=2, stages=2) as cluster:
        pid = cluster.node_pid("n1")
        (helper,) = threads_named(pid, "kf-compute")

        async def hang(streams: list[Stream]) -> None:
            frozen = time.time()
            with frozen_thread(pid, helper):
                await until(lambda: all(s.sent for s in streams), "all are sent")
                since = time.time()
                await cluster.wait_for(lambda s: node(s, "n1").state is NodeState.RED, "it is red")
                # When the first prompt reaches its stage is the machine's business.
                await told(cluster, "n1", HAS_NOT_ENDED, since, FOUND_S + 1.0, frozen)
            # A process whose thread is traced cannot be gone before.
            await cluster.wait_for(lambda s: node(s, "n1").pid not in (0, pid), "a fresh process is there")

        streams = asyncio.run(while_streaming(cluster, DECODE, hang))
        asyncio.run(cluster.expect_equal(streams))


def test_a_node_with_corrupted_weights(home: Cluster) -> None:
    """Numbers that are no numbers: its requests are computed elsewhere, and it starts afresh with sound weights."""
    asyncio.run(home.references(DECODE))
    pid = home.node_pid(CORRUPTED)
    with safe_open(Path(demo_model(), "model.safetensors"), "np") as tensors:
        layers = {int(name.split(".")[2]) for name in tensors.keys() if ".layers." in name}  # noqa: SIM118
        first_of_stage_2 = 2 * ((len(layers) + 3) // 4)
        weight = tensors.get_tensor(f"model.layers.{first_of_stage_2}.post_attention_layernorm.weight")

    async def corrupt(streams: list[Stream]) -> None:
        await flowing(streams, 120)
        nans = np.full_like(weight, np.nan)
        since = await asyncio.to_thread(overwrite, pid, weight.tobytes(), nans.tobytes())
        await found(home, CORRUPTED, "ceased to be finite here", since)
        await home.wait_for(lambda s: node(s, CORRUPTED).pid not in (0, pid), "a fresh process is there")

    streams = asyncio.run(while_streaming(home, DECODE, corrupt))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home(60.0))


@pytest.mark.parametrize("victims", [("n1", "n6"), ("n1", "n2"), ("n0", "n3")])
def test_two_failures_at_once_keep_serving(home: Cluster, victims: tuple[str, str]) -> None:
    """In two instances, or two stages of one, and for long: nobody comes back before everything is checked."""
    asyncio.run(home.references(DECODE))
    for name in victims:
        home.local.hold(name)

    async def kill(streams: list[Stream]) -> None:
        await flowing(streams, 120)
        for name in victims:
            home.kill(name)
        await home.wait_for(
            lambda s: s.available and all(not node(s, name).serving for name in victims), "peers serve"
        )

    streams = asyncio.run(while_streaming(home, DECODE, kill))
    asyncio.run(home.expect_equal(streams))
    fresh: list[Prompt] = sample_prompts(6, 60, first_seed=900)
    degraded = asyncio.run(home.generator.streams(fresh))
    assert '"degraded"' in health(home)[1]
    for name in victims:
        home.local.release(name)
    asyncio.run(home.wait_all_home(60.0))
    asyncio.run(home.expect_equal(degraded))
    assert '"ok"' in health(home)[1]
