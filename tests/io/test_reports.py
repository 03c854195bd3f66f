"""The server end of reports: who is cut off when, if a host's relay speaks for its nodes, and they may as well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from controlplane.backoff import Backoff
from controlplane.contract import rpc
from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.reports import BEATS_PER_S_MAX, NodeReport, ReportAck, ReportBatch, beat_every_s
from controlplane.core.events import CoreEvent, HeartbeatsReceived, ReportReceived, ReportStreamBroken
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer
from dataplane.report_stream import keep_reporting
from tests.io.etcd_proxy import eventually

A, B = Member("n0", "a"), Member("n1", "b")
BEAT_S = 0.1
REPORT_S = 0.5  # between two whole reports, of a few
METADATA = (("authorization", "Bearer token"),)


def report(member: Member, seq: int = 1) -> NodeReport:
    return NodeReport(member, seq, 0.0, 1)


class Stage:
    def __init__(self, address: str, inbox: Inbox, server: ReportServer) -> None:
        self.address = address
        self.inbox = inbox
        self.server = server

    @asynccontextmanager
    async def sender(self) -> AsyncIterator[Any]:
        """One stream on a connection of its own; the connection breaks at the end."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            yield channel.stream_stream(rpc.CONTROL_REPORT, rpc.encode, rpc.decode_ack)(metadata=METADATA)

    async def next(self, limit_s: float = 5.0) -> CoreEvent | None:
        return await self.inbox.get(limit_s)


def on_stage(body: Callable[[Stage], Awaitable[None]]) -> None:
    async def go() -> None:
        inbox = Inbox()
        server = ReportServer("token", inbox, TimingConfig(heartbeat_s=BEAT_S))
        stage = Stage(await server.start("127.0.0.1"), inbox, server)
        try:
            async with asyncio.timeout(20):
                await body(stage)
        finally:
            await server.stop()

    asyncio.run(go())


def test_a_relay_speaks_for_many_and_says_at_once_who_is_gone() -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as relay:
            await relay.write(ReportBatch(((0, report(A)), (1, report(B))), relay=True))
            assert await stage.next() == ReportReceived(report(A))
            assert await stage.next() == ReportReceived(report(B))
            assert stage.server.streams == 2
            await relay.write(ReportBatch(beats=(0, 1), relay=True))
            assert await stage.next() == HeartbeatsReceived((A, B))
            await relay.write(ReportBatch(beats=(0,), gone=(1,), relay=True))
            assert await stage.next() == HeartbeatsReceived((A,))
            assert await stage.next() == ReportStreamBroken(B)
            assert stage.server.streams == 1

    on_stage(body)


def test_nobody_is_cut_off_by_a_relay_that_dies_if_it_reports_by_itself() -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as own:
            async with stage.sender() as relay:
                await relay.write(ReportBatch(((0, report(A)), (1, report(B))), relay=True))
                assert await stage.next() == ReportReceived(report(A))
                assert await stage.next() == ReportReceived(report(B))
            await own.write(ReportBatch(((0, report(A)),)))
            assert await stage.next() == ReportReceived(report(A))
            seen: list[CoreEvent] = []
            while ReportStreamBroken(B) not in seen:  # B does not report: it is found, a moment later
                await own.write(ReportBatch(beats=(0,)))
                event = await stage.next(BEAT_S)
                if event is not None:
                    seen.append(event)
            assert ReportStreamBroken(A) not in seen
        assert await until_broken(stage) == ReportStreamBroken(A)

    on_stage(body)


def test_many_senders_are_told_to_beat_more_rarely_and_few_again_to_beat_as_before() -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as first:
            await first.write(ReportBatch(((0, report(A)),)))
            assert await first.read() == ReportAck(0, BEAT_S, report_s=REPORT_S)
            async with AsyncExitStack() as many:
                for _ in range(int(BEATS_PER_S_MAX * BEAT_S)):
                    sender = await many.enter_async_context(stage.sender())
                    await sender.write(ReportBatch())
                    await sender.read()
                await first.write(ReportBatch(beats=(0,)))
                assert await first.read() == ReportAck(0, 2 * BEAT_S, report_s=REPORT_S)
            told = asyncio.ensure_future(first.read())
            while not told.done():
                await first.write(ReportBatch(beats=(0,)))
                await asyncio.wait({told}, timeout=BEAT_S)
            assert told.result() == ReportAck(0, BEAT_S, report_s=REPORT_S)

    on_stage(body)


def test_very_many_nodes_are_asked_for_fewer_whole_reports_and_few_again_for_as_many() -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as relay:
            many = [Member(f"n{k}", "a") for k in range(501)]
            reports = tuple((slot, report(member)) for slot, member in enumerate(many))
            await relay.write(ReportBatch(reports, relay=True))
            assert await relay.read() == ReportAck(0, BEAT_S, report_s=1.0)
            await relay.write(ReportBatch(gone=(0,), relay=True))
            await relay.write(ReportBatch(relay=True))
            assert await relay.read() == ReportAck(0, BEAT_S, report_s=0.5)

    on_stage(body)


def test_who_was_told_to_beat_rarely_is_not_silent_when_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(stage: Stage) -> None:
        now = [100.0]
        monkeypatch.setattr("controlplane.shell.rpc.time", SimpleNamespace(monotonic=lambda: now[0]))
        async with stage.sender() as own, stage.sender() as relay:
            async with AsyncExitStack() as many:
                for _ in range(50):
                    sender = await many.enter_async_context(stage.sender())
                    await sender.write(ReportBatch())
                    await sender.read()
                await own.write(ReportBatch(((0, report(A)),)))
                assert await own.read() == ReportAck(0, 0.2, report_s=REPORT_S)
                await relay.write(ReportBatch(((0, report(A)), (1, report(B))), relay=True))
                assert await relay.read() == ReportAck(0, 0.2, report_s=REPORT_S)
            await eventually(lambda: stage.server.senders == 2, 5, "the others have left")
            now[0] += 0.5  # two of its beats and a half
            await relay.write(ReportBatch(beats=(1,), gone=(0,), relay=True))
            await relay.write(ReportBatch(beats=(1,), relay=True))
            seen = [await stage.next() for _ in range(5)]
            assert seen == [
                *map(ReportReceived, (report(A), report(A), report(B))),
                *[HeartbeatsReceived((B,))] * 2,
            ]
            now[0] += 0.5
            await own.done_writing()
            assert await stage.next() == ReportStreamBroken(A)

    on_stage(body)


def test_silence_alone_speaks_against_those_that_a_dead_relay_leaves() -> None:
    """On a busy machine a node may need longer than `suspect_after_s` for a stream of its own."""

    async def body(stage: Stage) -> None:
        timing = TimingConfig(heartbeat_s=BEAT_S)
        async with stage.sender() as relay:
            await relay.write(ReportBatch(((0, report(A)),), relay=True))
            assert await stage.next() == ReportReceived(report(A))
        await eventually(lambda: stage.server.senders == 0, 5, "the relay's stream has ended")
        ended = time.monotonic()
        assert await until_broken(stage) == ReportStreamBroken(A)
        assert time.monotonic() - ended >= timing.dead_after_s - 0.2

    on_stage(body)


def test_who_leaves_does_not_wait_for_room() -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as relay:
            await relay.write(ReportBatch(((0, report(A)),), relay=True))
            assert await relay.read() == ReportAck(0, BEAT_S, report_s=REPORT_S)
            await stage.inbox.put(*[HeartbeatsReceived((B,))] * 4095)
            assert len(stage.inbox) == 4096
            await relay.write(ReportBatch(gone=(0,), relay=True))
            await eventually(lambda: len(stage.inbox) == 4097, 5, "it has left")
            assert [await stage.next() for _ in range(4097)][-1] == ReportStreamBroken(A)

    on_stage(body)


@pytest.mark.parametrize(
    ("senders", "heartbeat_s", "suspect_after_s", "beat_s"),
    [
        (1, 0.1, 0.6, 0.1),
        (50, 0.1, 0.6, 0.1),
        (51, 0.1, 0.6, 0.2),
        (100_000, 0.1, 0.6, 0.2),  # three beats before anybody is suspected, however many they are
        (100_000, 0.05, 0.6, 0.2),
        (100_000, 0.1, 0.2, 0.1),
        (100_000, 5.0, 600.0, 200.0),
    ],
)
def test_how_often_so_many_beat(
    senders: int, heartbeat_s: float, suspect_after_s: float, beat_s: float
) -> None:
    assert beat_every_s(senders, heartbeat_s, suspect_after_s) == pytest.approx(beat_s)


def test_what_comes_late_on_a_second_way_is_no_news() -> None:
    """A relay that was stopped brings what it had taken in before its nodes reported by themselves."""

    async def body(stage: Stage) -> None:
        async with stage.sender() as relay:
            await relay.write(ReportBatch(((3, report(A, 5)),), relay=True))
            assert await stage.next() == ReportReceived(report(A, 5))
            async with stage.sender() as own:
                await own.write(ReportBatch(((0, report(A, 7)),)))
                assert await stage.next() == ReportReceived(report(A, 7))
                await relay.write(ReportBatch(((3, report(A, 6)),), relay=True))
                assert await stage.next() == HeartbeatsReceived((A,))
                await relay.write(ReportBatch(((3, report(A, 8)),), relay=True))
                assert await stage.next() == ReportReceived(report(A, 8))
                await own.write(ReportBatch(((0, report(A, 7)),)))
                assert await stage.next() == HeartbeatsReceived((A,))
            # A process of older code counts anew on each stream: what the last way said is over with it.
            async with stage.sender() as own:
                await relay.write(ReportBatch(gone=(3,), relay=True))
                await own.write(ReportBatch(((0, report(A, 1)),)))
                assert await until_report(stage) == ReportReceived(report(A, 1))

    on_stage(body)


def test_what_waited_in_a_relay_is_no_news_once_the_nodes_own_stream_has_ended() -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as relay:
            await relay.write(ReportBatch(((3, report(A, 5)),), relay=True))
            assert await stage.next() == ReportReceived(report(A, 5))
            async with stage.sender() as own:
                await own.write(ReportBatch(((0, report(A, 7)),)))
                assert await stage.next() == ReportReceived(report(A, 7))
            await eventually(lambda: stage.server.senders == 1, 10.0, "its own stream has ended")
            await relay.write(ReportBatch(((3, report(A, 6)), (3, report(A, 8))), relay=True))
            assert await until_report(stage) == ReportReceived(report(A, 8))

    on_stage(body)


def test_several_reports_of_one_node_in_a_batch_are_taken_in_their_order() -> None:
    """A relay brings them if they had to wait: of those that tell recoveries none may be left out."""

    async def body(stage: Stage) -> None:
        async with stage.sender() as relay:
            await relay.write(ReportBatch(((3, report(A, 5)), (3, report(A, 6))), relay=True))
            assert await stage.next() == ReportReceived(report(A, 5))
            assert await stage.next() == ReportReceived(report(A, 6))

    on_stage(body)


async def until_report(stage: Stage) -> CoreEvent | None:
    while isinstance(event := await stage.next(), HeartbeatsReceived | ReportStreamBroken):
        pass
    return event


async def until_broken(stage: Stage) -> CoreEvent | None:
    while isinstance(event := await stage.next(), HeartbeatsReceived):
        pass
    return event


@pytest.mark.parametrize(
    "batch",
    [
        ReportBatch(beats=(7,)),  # nobody has that slot
        ReportBatch(reports=((0, report(A)), (0, report(B)))),  # two members in one
        ReportBatch(reports=((0, report(A)), (1, report(A)))),  # one member in two
    ],
)
def test_a_sender_that_breaks_the_protocol_is_refused(batch: ReportBatch) -> None:
    async def body(stage: Stage) -> None:
        async with stage.sender() as own:
            await own.write(batch)
            assert await own.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert stage.server.refused == 1

    on_stage(body)


def test_an_answer_that_cannot_be_taken_in_costs_one_stream_and_not_all_further_reports() -> None:
    """Any exception but those of gRPC ended the task: the node was silent from then on."""

    async def body(stage: Stage) -> None:
        answers: list[ReportAck] = []
        broken: list[str] = []

        async def batches() -> AsyncIterator[ReportBatch]:
            yield ReportBatch(((0, report(A)),))
            await asyncio.Event().wait()

        def acknowledged(ack: ReportAck) -> None:
            answers.append(ack)
            if len(answers) < 3:
                raise ValueError("not for me")

        backoff = Backoff(0.01, 0.02)
        reporting = asyncio.create_task(
            keep_reporting(stage.address, "token", backoff, batches, acknowledged, broken.append)
        )
        await eventually(lambda: len(answers) == 3 or reporting.done(), 10.0, "the third stream stands")
        assert not reporting.done()
        assert broken == ["ValueError: not for me"] * 2
        assert backoff.total == 2
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)

    on_stage(body)
