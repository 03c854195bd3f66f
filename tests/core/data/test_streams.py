"""Links that come back, reports that fail, gateways that hang up or do not read."""

from __future__ import annotations

import asyncio

import grpc
import msgspec
import pytest

from controlplane.contract import rpc
from controlplane.contract.ids import Member
from controlplane.contract.records import ControllerRecord
from controlplane.contract.reports import NodeReport
from controlplane.contract.requests import Cancel, GatewayMessage, Token, Tokens
from dataplane.core.messages import Ping
from dataplane.core.peers import Peers
from dataplane.frontdoor import Frontdoor
from dataplane.node import Node
from dataplane.reporter import Reporter
from dataplane.transport import frames
from tests.core.data.parts import ME, NEXT, submitted


class Connected:
    """A transport whose links to others stand."""

    def connected(self, _peer: Member) -> bool:
        return True


def test_a_peer_whose_link_to_us_is_back_is_not_reported_as_down_for_ever() -> None:
    """Only links that we open announce that they are up; a stale "down" would make a late report a death."""
    node = Node.__new__(Node)
    node._transport = Connected()  # type: ignore[assignment]
    node._peers = Peers(ME, 0)
    node._peers._down = {NEXT: "incoming link: reset", Member("n2", "a"): "outgoing link: reset"}
    node._on_message(NEXT, memoryview(frames.join(frames.encode(Ping()))))
    assert [peer for peer in (NEXT, Member("n2", "a")) if node._peers.is_down(peer)] == [Member("n2", "a")]


def test_reports_go_on_after_one_that_could_not_be_made() -> None:
    async def go() -> None:
        heard = asyncio.Event()

        async def report(_requests: object, context: grpc.aio.ServicerContext) -> None:
            await context.read()
            heard.set()
            await context.read()

        made = 0

        def make(seq: int, _sent: int) -> tuple[NodeReport, int]:
            nonlocal made
            made += 1
            if made == 1:
                raise ValueError("a count that does not fit")
            return NodeReport(ME, seq, 0.0, 0), 0

        server = grpc.aio.server()
        server.add_generic_rpc_handlers((rpc.stream_handler(rpc.CONTROL, "Report", report, None),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        reporter = Reporter("token", 0.05, make)
        reporter.set_controllers({"c0": ControllerRecord("c0", f"127.0.0.1:{port}", "", 1)})
        try:
            async with asyncio.timeout(5):
                await heard.wait()
        finally:
            await reporter.close()
            await server.stop(grace=0)

    asyncio.run(go())


def test_unknown_fields_are_passed_over_and_a_newer_gateway_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        taken: list[GatewayMessage] = []
        frontdoor = Frontdoor("token", lambda _, message: taken.append(message), lambda _: None)
        address = await frontdoor.start("127.0.0.1")
        newer = {"type": "cancel", "rid": 7, "pipeline": "p0", "zone_policy": "near"}
        async with grpc.aio.insecure_channel(address) as channel:
            serve = channel.stream_stream(rpc.FRONTDOOR_SERVE, request_serializer=msgspec.msgpack.encode)
            call = serve(metadata=(("authorization", "Bearer token"), (rpc.STREAM_SCHEMA_KEY, "1")))
            await call.write(newer)
            async with asyncio.timeout(5):
                while not taken:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert taken == [Cancel(7, "p0")]
            call.cancel()
            assert frontdoor.troubles() == ()
            for _ in range(2):
                call = serve(metadata=(("authorization", "Bearer token"), (rpc.STREAM_SCHEMA_KEY, "2")))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await asyncio.wait_for(_read_all(call), 5)
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert "have schema 2, this node reads 1 to 1: restart the node" in str(
                    refused.value.details()
                )
        assert len(taken) == 1
        (told,) = frontdoor.troubles()
        assert "schema 2" in told
        await frontdoor.close()

    asyncio.run(go())
    assert sum("a gateway is refused" in line for line in caplog.messages) == 1, "it tries again each second"


def test_an_older_gateway_than_the_oldest_is_told_to_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rpc.refusal({}) == rpc.refusal({rpc.STREAM_SCHEMA_KEY: "1"}) == ""
    monkeypatch.setattr(rpc, "STREAM_SCHEMA", 3)
    monkeypatch.setattr(rpc, "STREAM_SCHEMA_OLDEST", 2)
    assert rpc.refusal({rpc.STREAM_SCHEMA_KEY: "2"}) == ""
    assert "restart the gateway" in rpc.refusal({})
    assert "restart the node" in rpc.refusal({rpc.STREAM_SCHEMA_KEY: "4"})
    assert rpc.refusal({rpc.STREAM_SCHEMA_KEY: "x"})


def test_a_gateway_that_hangs_up_leaves_no_task_behind() -> None:
    async def go() -> None:
        lost = asyncio.Event()
        frontdoor = Frontdoor("token", lambda *_: None, lambda _: lost.set())
        address = await frontdoor.start("127.0.0.1")
        async with grpc.aio.insecure_channel(address) as channel:
            serve = channel.stream_stream(rpc.FRONTDOOR_SERVE, request_serializer=rpc.encode)
            call = serve(metadata=(("authorization", "Bearer token"),))
            await call.write(submitted(1).message)
            async with asyncio.timeout(5):
                while not frontdoor._sessions:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            call.cancel()
            async with asyncio.timeout(5):
                await lost.wait()
        await frontdoor.close()
        async with asyncio.timeout(5):
            while [t for t in asyncio.all_tasks() if "Frontdoor" in repr(t.get_coro())]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(go())


async def _read_all(call: grpc.aio.StreamStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def test_a_gateway_that_does_not_read_is_told_so_and_costs_a_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dataplane.frontdoor.OUTBOX_MAX", 50)

    async def go() -> None:
        lost = asyncio.Event()
        frontdoor = Frontdoor("token", lambda *_: None, lambda _: lost.set())
        address = await frontdoor.start("127.0.0.1")
        large = Tokens("p0", 1, tuple(Token(1, i, 7) for i in range(2000)))
        async with grpc.aio.insecure_channel(address) as channel:
            serve = channel.stream_stream(
                rpc.FRONTDOOR_SERVE,
                request_serializer=rpc.encode,
                response_deserializer=rpc.decode_scheduler_message,
            )
            call = serve(metadata=(("authorization", "Bearer token"),))
            await call.write(submitted(1).message)
            async with asyncio.timeout(5):
                while not frontdoor._sessions:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                (session,) = frontdoor._sessions
                for _ in range(200):
                    frontdoor.send(session, large)
                assert len(frontdoor._sessions[session].outbox) <= 50
                with pytest.raises(grpc.aio.AioRpcError, match="does not read"):
                    await _read_all(call)
                await lost.wait()
        assert frontdoor.sessions_overrun == 1
        await frontdoor.close()

    asyncio.run(go())
