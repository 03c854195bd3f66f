"""Streams through real HTTP and gRPC while schedulers die, move, refuse, repeat themselves and lie."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from controlplane.contract.requests import RefusalCode
from controlplane.contract.topology import Mode
from tests.web.gateway.fake_node import reference
from tests.web.gateway.stack import Events, Stack, running, stream
from web.gateway.routing.policy import Policy

PROMPT = (400, 401, 402)
STREAMS = 6


def body(seed: int, max_tokens: int = 60) -> dict[str, Any]:
    return {"prompt": list(PROMPT), "seed": seed, "max_tokens": max_tokens, "return_token_ids": True}


async def run_streams(
    stack: Stack, disturb: Callable[[list[Events]], Awaitable[None]], max_tokens: int = 60
) -> list[Events]:
    """STREAMS streams, disturbed once each has some tokens."""
    found = [Events() for _ in range(STREAMS)]
    async with stack.http() as client, asyncio.timeout(20):
        tasks = [
            asyncio.create_task(stream(client, body(seed, max_tokens), into=found[seed]))
            for seed in range(STREAMS)
        ]
        await stack.until(lambda: all(len(events.ids()) > 5 for events in found))
        await disturb(found)
        await asyncio.gather(*tasks)
    return found


def check_exact(found: list[Events], max_tokens: int = 60) -> None:
    for seed, events in enumerate(found):
        assert events.errors == []
        assert events.done
        assert events.ids() == reference(PROMPT, seed, max_tokens)
        assert events.finish() == "length"


def test_scheduler_moves_between_live_nodes() -> None:
    async def run() -> None:
        async with running(3) as stack:

            async def move(found: list[Events]) -> None:
                stack.place(p0=2, p1=2)
                await stack.until(lambda: all(len(events.ids()) > 15 for events in found))
                stack.place(p0=0)

            check_exact(await run_streams(stack, move))
            assert stack.dispatcher.router.counts["recovered_resubmitted"] >= STREAMS
            resubmits = [s for s in stack.nodes[2].submits]
            assert resubmits
            assert all(s.admitted and len(s.emitted) > 5 for s in resubmits)

    asyncio.run(run())


def test_scheduler_dies_and_another_takes_over() -> None:
    async def run() -> None:
        async with running(3) as stack:

            async def kill(_: list[Events]) -> None:
                await stack.nodes[0].stop()
                stack.place(p0=2)

            check_exact(await run_streams(stack, kill))
            assert "kevlarflow_failover_gap_seconds_count" in stack.service.metrics.render()[0].decode()

    asyncio.run(run())


def test_epoch_changes_under_the_same_scheduler() -> None:
    async def run() -> None:
        async with running() as stack:

            async def switch(_: list[Events]) -> None:
                # The gateway hears of the epoch first: what its scheduler still sends counts.
                for node in stack.nodes:
                    node.stale_next = 3
                stack.place(p0=0, p1=1)

            check_exact(await run_streams(stack, switch))
            assert all(node.stale_next == 0 for node in stack.nodes)
            assert stack.dispatcher.router.counts["stale_epoch"] == 0

    asyncio.run(run())


def test_broken_streams_are_reopened() -> None:
    async def run() -> None:
        async with running() as stack:

            async def break_all(_: list[Events]) -> None:
                for node in stack.nodes:
                    node.break_streams()

            check_exact(await run_streams(stack, break_all))
            assert all(node.streams == 2 for node in stack.nodes)

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["duplicate", "drop"])
def test_duplicates_and_gaps(fault: str) -> None:
    async def run() -> None:
        async with running() as stack:

            async def disturb(_: list[Events]) -> None:
                for node in stack.nodes:
                    node.duplicate = fault == "duplicate"
                    node.drop_next = 7 if fault == "drop" else 0

            check_exact(await run_streams(stack, disturb))
            kind = "duplicate" if fault == "duplicate" else "gap"
            assert stack.dispatcher.router.counts[kind] > 0

    asyncio.run(run())


def test_lost_last_token_is_asked_for() -> None:
    """The gap at the end of a stream: nothing later would show it, except that the epoch was stale."""

    async def run() -> None:
        async with running(1) as stack, stack.http() as client, asyncio.timeout(10):
            stack.nodes[0].stale_next = 1000
            found = asyncio.create_task(stream(client, body(3, 4)))
            await stack.until(lambda: stack.dispatcher.router.counts["stale_epoch"] >= 4)
            stack.nodes[0].stale_next = 0
            events = await found
            assert events.ids() == reference(PROMPT, 3, 4)
            assert events.done

    asyncio.run(run())


def test_not_here_is_retried() -> None:
    async def run() -> None:
        async with running(3) as stack:

            async def move(_: list[Events]) -> None:
                node = stack.nodes[2]
                refusals = iter(range(4 * STREAMS))
                node.refuse = lambda _: RefusalCode.NOT_HERE if next(refusals, None) is not None else None
                stack.place(p0=2, p1=2)

            check_exact(await run_streams(stack, move))
            assert stack.dispatcher.router.counts["not_here"] >= 4 * STREAMS

    asyncio.run(run())


def test_pipeline_down_moves_its_streams_to_another() -> None:
    async def run() -> None:
        async with running(policy=Policy(move_after_s=0.1)) as stack:

            async def down(_: list[Events]) -> None:
                stack.place(p0=None)

            check_exact(await run_streams(stack, down))
            assert stack.dispatcher.router.counts["recovered_moved"] > 0
            assert {c.pipeline for c in stack.nodes[0].cancels} <= {"p0"}

    asyncio.run(run())


def test_stop_restart_starts_from_scratch() -> None:
    async def run() -> None:
        async with running() as stack:
            stack.mode = Mode.STOP_RESTART
            stack.place()

            async def down(_: list[Events]) -> None:
                stack.place(p0=None)

            check_exact(await run_streams(stack, down))
            again = [s for s in stack.nodes[1].submits if s.admitted]
            assert again
            assert all(s.emitted == () for s in again)
            assert stack.dispatcher.router.counts["duplicate"] > 0  # the client's own tokens, made again

    asyncio.run(run())


def test_different_tokens_fail_the_stream_explicitly() -> None:
    async def run() -> None:
        async with running() as stack:
            stack.mode = Mode.STOP_RESTART
            stack.place()
            stack.nodes[1].twist = True

            async def down(_: list[Events]) -> None:
                stack.place(p0=None)

            found = await run_streams(stack, down, 200)
            failed = [events for events in found if events.errors]
            assert failed
            for events in failed:
                assert events.done
                assert events.errors[0]["code"] == 500
                assert "computed again" in events.errors[0]["message"]
            assert stack.dispatcher.router.counts["mismatch"] == len(failed)

    asyncio.run(run())


def test_no_pipeline_fails_streams_after_the_grace_and_refuses_new_ones() -> None:
    async def run() -> None:
        async with running(policy=Policy(grace_s=0.3)) as stack:

            async def down(found: list[Events]) -> None:
                stack.place(p0=None, p1=None)
                async with stack.http() as client:
                    assert (await client.get("/health")).status_code == 503
                    assert not any(events.errors for events in found)
                    for _ in ("which waits as long", "which does not"):
                        refused = await client.post("/v1/completions", json={"prompt": "x"})
                        assert refused.status_code == 503
                        assert int(refused.headers["retry-after"]) >= 1
                    assert stack.dispatcher.router.live == 0

            for events in await run_streams(stack, down, 500):
                assert events.done
                assert events.errors[0]["code"] == 503
                assert events.ids() == reference(PROMPT, found_seed(events), 500)[: len(events.ids())]

    asyncio.run(run())


def found_seed(events: Events) -> int:
    """Which of the seeds a stream belongs to, by its first tokens."""
    return next(s for s in range(STREAMS) if reference(PROMPT, s, 5) == events.ids()[:5])


def test_overload_tries_another_pipeline_then_429() -> None:
    async def run() -> None:
        async with running() as stack, stack.http() as client, asyncio.timeout(10):
            stack.nodes[0].refuse = lambda _: RefusalCode.OVERLOADED
            for seed in range(3):
                assert (await stream(client, body(seed, 3))).ids() == reference(PROMPT, seed, 3)
            stack.nodes[1].refuse = lambda _: RefusalCode.OVERLOADED
            for streaming in (True, False):
                events = await stream(client, body(1, 3) | {"stream": streaming})
                assert events.status == 429
                assert events.headers["retry-after"] == "2"
                assert events.errors[0]["type"] == "RateLimitError"
            assert stack.dispatcher.router.live == 0

    asyncio.run(run())


def test_final_refusals() -> None:
    async def run() -> None:
        async with running() as stack, stack.http() as client, asyncio.timeout(10):
            for node in stack.nodes:
                node.refuse = lambda _: RefusalCode.INVALID
            events = await stream(client, body(1, 3))
            assert events.status == 400
            assert sum(len(node.submits) for node in stack.nodes) == 1

    asyncio.run(run())


def test_disconnect_cancels_everywhere() -> None:
    async def run() -> None:
        async with running() as stack, asyncio.timeout(20):
            for streaming in (True, False):
                async with stack.http() as client:
                    events = Events()
                    request = body(1, 1500) | {"n": 2, "stream": streaming}
                    task = asyncio.create_task(stream(client, request, into=events))
                    await stack.until(lambda: sum(len(node.running) for node in stack.nodes) == 2)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    await stack.until(lambda: not any(node.running for node in stack.nodes))
                    assert stack.dispatcher.router.live == 0
            assert sum(len(node.cancels) for node in stack.nodes) == 4

    asyncio.run(run())


def test_a_stop_sends_streams_to_another_gateway() -> None:
    async def run() -> None:
        async with running() as stack:

            async def stop(_: list[Events]) -> None:
                stack.stop()

            for events in await run_streams(stack, stop, 1500):
                assert not events.done
                assert events.fields == ["event: reconnect", "retry: 100"]
                assert "shutting down" in events.errors[0]["message"]
            assert sum(len(node.running) for node in stack.nodes) == STREAMS, "they go on meanwhile"
            assert not any(node.cancels for node in stack.nodes)
            assert stack.serving is not None
            async with asyncio.timeout(3):
                await stack.serving

    asyncio.run(run())


def test_idle_streams_get_comments() -> None:
    async def run() -> None:
        async with running(keep_alive_s=0.05) as stack, stack.http() as client, asyncio.timeout(10):
            for node in stack.nodes:
                node.held = True
            events = Events()
            task = asyncio.create_task(stream(client, body(1, 5), into=events))
            await stack.until(lambda: events.comments >= 3)
            for node in stack.nodes:
                node.held = False
            await task
            assert events.ids() == reference(PROMPT, 1, 5)

    asyncio.run(run())
