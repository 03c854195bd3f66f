"""Links to schedulers, without a gateway around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from controlplane.backoff import Backoff
from controlplane.contract import rpc
from controlplane.contract.ids import Member
from dataplane.frontdoor import Frontdoor
from web.gateway.routing import scheduler_streams
from web.gateway.routing.events import Event
from web.gateway.routing.scheduler_streams import Links, _Link

NODE = Member("n0", "i0")


class Recorded(Backoff):
    def __init__(self, first_s: float, max_s: float) -> None:
        super().__init__(first_s, max_s)
        self.paused: list[int] = []  # attempts in a row at each pause

    async def pause(self, limit_s: float | None = None) -> None:
        self.paused.append(self.attempts + 1)
        await super().pause(limit_s)


def test_a_link_ends_although_its_call_breaks_in_the_moment_in_which_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A TaskGroup whose task is cancelled and whose child fails raises the child's error and nothing else: the link
    went on for ever, and whoever waited for its end did as well."""
    tries = 0
    tried = asyncio.Event()

    async def once(link: _Link, address: str) -> None:
        nonlocal tries
        tries += 1
        tried.set()

        async def breaks() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ConnectionError("the call is over")

        async with asyncio.TaskGroup() as group:
            group.create_task(breaks())
            await asyncio.Event().wait()

    async def run() -> None:
        events: list[Event] = []
        links = Links("token", events.append)
        monkeypatch.setattr(_Link, "_once", once)
        links.locate(NODE, "127.0.0.1:1")
        for close in (lambda: links.close(NODE), lambda: None):
            tried.clear()
            links.open(NODE)
            task = links._links[NODE].task
            async with asyncio.timeout(10):
                await tried.wait()
                close()
                await asyncio.wait([task, asyncio.create_task(links.aclose())], timeout=2.0)
            ended = task.cancelled()
            while not task.done():  # do not hang where it does not end
                await asyncio.sleep(0.05)
                task.cancel()
            assert ended
        assert tries == 2
        assert not events

    asyncio.run(run())


def test_a_node_that_refuses_this_gateways_version_is_told_and_not_asked_in_a_hot_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backoffs: list[Recorded] = []
    monkeypatch.setattr(
        scheduler_streams, "Backoff", lambda *spans: backoffs.append(Recorded(*spans)) or backoffs[-1]
    )
    # A slow machine: each refusal takes longer than that.
    monkeypatch.setattr(scheduler_streams, "STEADY_S", 0.0)
    events: list[Event] = []

    async def run() -> None:
        node = Frontdoor("token", lambda *_: None, lambda _: None)
        address = await node.start("127.0.0.1")
        with monkeypatch.context() as newer:
            newer.setattr(rpc, "STREAM_SCHEMA", 2)
            links = Links("token", events.append)
        links.locate(NODE, address)
        links.open(NODE)
        async with asyncio.timeout(20):
            while not backoffs or len(backoffs[0].paused) < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert links.troubles() == [
            "n0: the gateway's messages have schema 2, this node reads 1 to 1: restart the node with the newer code"
        ]
        assert node.troubles()
        assert events == [], "a stream that is refused was never up"
        assert backoffs[0].paused == [1, 2, 3, 4, 5], "each pause is longer than the one before"
        links._metadata = Links("token", events.append)._metadata  # as if the node had been restarted
        async with asyncio.timeout(20):
            while not events:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert links.troubles() == [], "a node that serves us has said so by its first answer"
        links.close(NODE)
        assert links.troubles() == []
        await links.aclose()
        await node.close()

    asyncio.run(run())


def test_a_node_of_code_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before streams had a schema a node accepted one without a word."""
    monkeypatch.setattr(scheduler_streams, "ANSWER_S", 0.05)
    events: list[Event] = []

    async def silent(
        requests: AsyncIterator[object], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[object]:
        await asyncio.Event().wait()
        yield None

    async def run() -> None:
        server = grpc.aio.server()
        handler = rpc.stream_handler(rpc.FRONTDOOR, "Serve", silent, rpc.decode_gateway_message)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        links = Links("token", events.append)
        links.locate(NODE, f"127.0.0.1:{port}")
        links.open(NODE)
        async with asyncio.timeout(20):
            while links.reconnects < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        (trouble,) = links.troubles()
        assert trouble.startswith("n0: it has not said within 10 s that it serves this gateway")
        assert events == []
        await server.stop(None)
        async with asyncio.timeout(20):
            while links.troubles():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await links.aclose()

    asyncio.run(run())
