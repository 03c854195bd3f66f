"""kill -9 of every node, at every phase of sixteen streams: no token lost, doubled or different."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest

from controlplane.contract.events import Event, EventKind
from controlplane.contract.protection import Loss, Protection
from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from tests.e2e.cluster import Cluster, all_home, until, while_streaming

STREAMS = 16
TOKENS = 96
STORY = (EventKind.DIED, EventKind.EPOCH, EventKind.RECOVERED, EventKind.MOVE, EventKind.EPOCH)
# A long prompt goes in several chunks: there is a prefill to be interrupted.
PREFILL = sample_prompts(STREAMS, 24, words=300)
DECODE = sample_prompts(STREAMS, TOKENS)

MOMENTS: dict[str, tuple[list[Prompt], int]] = {
    "prefill": (PREFILL, 0),
    "early": (DECODE, 4),
    "late": (DECODE, TOKENS - 16),
}


def progressed(streams: list[Stream], tokens: int) -> Callable[[], bool]:
    """All streams are open and have brought `tokens` each on average."""
    return lambda: (
        all(s.sent for s in streams) and sum(len(s.tokens) for s in streams) >= tokens * len(streams)
    )


@pytest.mark.parametrize(
    ("victim", "moment"),
    [(f"n{i}", ("prefill", "early", "late")[i % 3]) for i in range(8)] + [("n0", "late"), ("n7", "prefill")],
)
def test_a_killed_node_costs_no_token(home: Cluster, victim: str, moment: str) -> None:
    prompts, tokens = MOMENTS[moment]
    asyncio.run(home.references(prompts))
    asyncio.run(home.wait_all_home())
    before = home.local.node_pids()

    async def kill(streams: list[Stream]) -> None:
        await until(progressed(streams, tokens), f"{tokens} tokens a stream")
        home.kill(victim)

    streams = asyncio.run(while_streaming(home, prompts, kill))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    after = home.local.node_pids()
    assert {n for n in before if before[n] != after[n]} == {victim}, "a survivor was restarted"


@pytest.mark.parametrize(("first", "second"), [("n1", "n2"), ("n0", "n1"), ("n2", "n6"), ("n4", "n0")])
def test_a_second_kill_during_recovery(home: Cluster, first: str, second: str) -> None:
    """Another stage of the same pipeline, or the very node that was borrowed (then nobody is left for a while)."""
    asyncio.run(home.references(DECODE))

    async def kill_two(streams: list[Stream]) -> None:
        await until(progressed(streams, 20), "20 tokens a stream")
        status = await home.status()
        home.kill(first)
        await home.wait_for(lambda s: s.counter > status.counter, "the first death is answered", limit_s=10.0)
        home.kill(second)

    streams = asyncio.run(while_streaming(home, DECODE, kill_two))
    asyncio.run(home.expect_equal(streams))


def test_a_stopped_node_changes_nothing_when_it_wakes(home: Cluster) -> None:
    """SIGSTOP for five seconds: replaced like a dead one; what it then says is of an epoch that is over."""
    prompts = sample_prompts(STREAMS, 256)
    asyncio.run(home.references(prompts))
    asyncio.run(home.wait_all_home())  # nobody serves for the victim
    victim = "n1"
    pid = home.node_pid(victim)

    async def stop_and_go(streams: list[Stream]) -> None:
        await until(progressed(streams, 10), "10 tokens a stream")
        status = await home.status()
        home.kill(victim, signal.SIGSTOP)
        try:
            await asyncio.sleep(5.0)  # the length of the fault, not a wait for anything
            moved = await home.status()
            epoch = {p.id: p.epoch for p in status.pipelines}
            assert any(p.epoch > epoch[p.id] for p in moved.pipelines), "the silence was not noticed"
        finally:
            home.kill(victim, signal.SIGCONT)

    streams = asyncio.run(while_streaming(home, prompts, stop_and_go))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    assert home.node_pid(victim) == pid, "it only slept: it needs no new process"


def test_a_stopped_scheduler_emits_nothing_when_it_wakes(home: Cluster) -> None:
    """The same for stage 0, whose streams to the gateway are still open when it wakes."""
    prompts = sample_prompts(STREAMS, 256)
    asyncio.run(home.references(prompts))

    async def stop_and_go(streams: list[Stream]) -> None:
        await until(progressed(streams, 10), "10 tokens a stream")
        home.kill("n4", signal.SIGSTOP)
        try:
            await asyncio.sleep(5.0)  # the length of the fault
        finally:
            home.kill("n4", signal.SIGCONT)

    streams = asyncio.run(while_streaming(home, prompts, stop_and_go))
    asyncio.run(home.expect_equal(streams))


def at_home_with_copies(status: ClusterStatus) -> bool:
    return all_home(status) and all(stage.lag_tokens >= 0 for p in status.pipelines for stage in p.stages)


def test_the_history_tells_the_story(home: Cluster) -> None:
    """After a kill: died, epoch switched, recovered with its phases, joined, handed back."""

    def look() -> Protection:
        with home.local.admin() as admin:
            return admin.protection()

    def of_n5(protection: Protection) -> Loss:
        return next(loss for loss in protection.losses if loss.node == "n5")

    async def kill(streams: list[Stream]) -> None:
        await until(progressed(streams, 8), "8 tokens a stream")
        # What a node has and protects comes with its reports, which are late where the machine is busy.
        told.append(await asyncio.to_thread(look))
        while not (of_n5(told[-1]).streams and told[-1].protected_bytes):
            assert not any(stream.done for stream in streams), f"foretold to the end: {told[-1]}"
            told.append(await asyncio.to_thread(look))
        home.kill("n5")

    told: list[Protection] = []
    asyncio.run(home.wait_for(at_home_with_copies, "all nodes at home, with copies", 30.0))
    with home.local.admin() as admin:
        newest = max((row.id for row in admin.events(limit=1)), default=0)
    asyncio.run(while_streaming(home, sample_prompts(STREAMS, 256), kill))
    asyncio.run(home.wait_all_home())
    events: list[Event] = []

    def whole() -> bool:  # it is written after what it tells of, and later on a busy machine
        with home.local.admin() as admin:
            events[:] = [row.event for row in admin.events(limit=200, after=newest)]
        kinds = (event.kind for event in events)
        return all(kind in kinds for kind in STORY)  # in this order

    asyncio.run(until(whole, f"the history has {STORY}"))
    assert EventKind.JOINED in {event.kind for event in events}
    recovered = next(e for e in events if e.kind is EventKind.RECOVERED)
    assert {"connect_s", "restore_s", "first_token_s", "requests", "tokens_recomputed"} <= set(
        recovered.details
    )
    assert recovered.details["requests"] > 0
    cost = of_n5(told[-1])
    assert cost.serves == ("p1/1",)
    assert cost.how == ("p1: goes on from the copy on n1",)
    assert 0 < cost.streams <= STREAMS
    assert 0 < told[-1].protected_bytes <= told[-1].kv_bytes
    # Of each stream at most the block that is not full is computed again, and what came between the two looks.
    assert cost.tokens < told[-1].kv_bytes
    assert recovered.details["tokens_recomputed"] <= 2 * STREAMS * home.local.config.engine.block_size
