"""Figures on a real database and over real gRPC: from a gateway's counts to rows that a later controller still has."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from controlplane.contract import rpc
from controlplane.contract.config import TimingConfig
from controlplane.contract.events import Event, EventKind
from controlplane.contract.figures import Figures, GatewayReport, Histogram
from controlplane.contract.identity import PLAIN, Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from controlplane.contract.status import ClusterStatus
from controlplane.contract.topology import Mode
from controlplane.history.store import HistoryStore
from controlplane.history.writer import HistoryWriter
from controlplane.shell import figures as shell
from controlplane.shell.figures import Recorder
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer
from tests.certificates import CLUSTER, folder, settings
from web.gateway import figures as gateway
from web.gateway.figures import FiguresReporter
from web.gateway.metrics import LATENCIES_S, Metrics

TOKEN = "token"


def url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'h.db'}"


def row(unix_s: float, running: int = 0) -> Figures:
    return Figures(unix_s, running, tokens_per_s=12.5)


async def until(condition: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.01)


def test_rows_come_back_spread_evenly_and_old_ones_go(tmp_path: Path) -> None:
    async def main() -> None:
        store, other = (HistoryStore(url(tmp_path), name, "c1") for name in ("one", "two"))
        await store.upgrade()
        written = [row(1000.0 + k, k) for k in range(100)]
        await store.append([*written, Event(EventKind.LEADER, "c1", "c1 leads")])
        await other.append([row(1000.5)])
        assert await store.figures(0, 2000, 500) == written
        assert await store.figures(1009, 1011, 500) == written[10:12]
        few = await store.figures(0, 2000, 10)
        assert len(few) == 10
        assert few[-1] == written[-1]
        assert {round(b.unix_s - a.unix_s) for a, b in itertools.pairwise(few)} == {10}
        assert await store.prune_figures(1090.0) == 90
        assert await store.figures(0, 2000, 500) == written[90:]
        assert len(await other.figures(0, 2000, 500)) == 1
        assert len(await store.tail(10)) == 1
        await store.close()
        await other.close()

    asyncio.run(main())


def test_of_what_waits_for_the_database_figures_are_dropped_first(tmp_path: Path) -> None:
    async def main() -> None:
        store = HistoryStore(url(tmp_path), "c", "c1")
        history = HistoryWriter(store, queue_len_max=4)
        for k in range(3):
            history.put(row(float(k)))
            history.put(Event(EventKind.LEADER, f"e{k}", "", float(k)))
        history.put(row(9.0))
        assert history.dropped == 3
        task = asyncio.create_task(history.run())
        await until(lambda: history.written == 4, "the rest is written")
        assert [event.subject for _, event in await store.tail(10)] == ["e0", "e1", "e2"]
        assert [one.unix_s for one in await store.figures(-1, 10, 10)] == [9.0]
        task.cancel()
        await store.close()

    asyncio.run(main())


def test_a_status_that_cannot_be_made_leaves_a_gap_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.shell.figures.PERIOD_S", 0.01)

    async def main() -> None:
        store = HistoryStore(url(tmp_path), "c", "c1")
        recorder = Recorder(TOKEN, HistoryWriter(store), lambda: True)
        good = ClusterStatus("c", "g", "m", Mode.REPLICATE, True, 1, False, "", "c1", 0.0, (), (), (), (), ())
        asked = 0

        async def status() -> ClusterStatus:
            nonlocal asked
            asked += 1
            if asked <= 3:
                raise IndexError("tuple index out of range")
            return good

        task = asyncio.create_task(recorder.run(status))
        await until(lambda: task.done() or len(recorder.rows(0.0)) > 1, "rows are made again")
        assert not task.done()
        assert recorder.failed == 3
        task.cancel()
        await store.close()

    asyncio.run(main())


class Measured:
    """A controller's recorder behind its gRPC server, and the history that it writes."""

    def __init__(self, folder: Path, leads: bool = True, identity: Identity = PLAIN) -> None:
        self.store = HistoryStore(url(folder), "c", "c1")
        self.history = HistoryWriter(self.store)
        self.recorder = Recorder(TOKEN, self.history, lambda: leads, identity)
        self.server = ReportServer(TOKEN, Inbox(), TimingConfig(), identity, beside=[self.recorder.handler()])
        self.address = ""

    async def __aenter__(self) -> Measured:
        self.address = await self.server.start("127.0.0.1")
        self.tasks = [asyncio.create_task(self.history.run())]
        await until(lambda: self.history.healthy, "the database is there")
        self.tasks.append(asyncio.create_task(self.recorder.run(self.status)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.stop()
        await self.store.close()

    async def status(self) -> ClusterStatus:
        return ClusterStatus("c", "g", "m", Mode.REPLICATE, True, 1, False, "", "c1", 0.0, (), (), (), (), ())


def test_from_a_gateways_counts_to_a_row_that_outlives_its_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "PERIOD_S", 0.05)
    monkeypatch.setattr(shell, "PERIOD_S", 0.1)

    async def main() -> None:
        metrics = Metrics()
        began = time.time()
        async with Measured(tmp_path) as first:
            addresses = {"c1": first.address, "c2": "127.0.0.1:1"}  # nobody listens at the other one
            reporter = FiguresReporter(Member("g1", "a"), TOKEN, metrics, lambda: addresses)
            reporting = asyncio.create_task(reporter.run())

            def rows() -> list[Figures]:
                metrics.tokens.given += 7
                metrics.tokens.waited(0.03)
                metrics.ttft.observe(0.25)
                return [one for one in first.recorder.rows(0.0) if one.tokens_per_s]

            await until(lambda: any(one.first_token_p50_s for one in rows()), "a row has what was counted")
            await until(lambda: reporter.failures > 0, "the controller that is away is counted")
            found = next(one for one in rows() if one.first_token_p50_s)
            assert 0.15 < (found.first_token_p50_s or 0.0) <= 0.3
            assert 0.02 < (found.inter_token_p99_s or 0.0) <= 0.04
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            assert all(one.unix_s > found.unix_s for one in first.recorder.rows(found.unix_s))
            newer = first.recorder.rows
            await until(lambda: newer(found.unix_s), "a later row comes")
            await until(
                lambda: first.history.written >= len(newer(0.0)) - 1, "the rows before it are written"
            )
        # Another process, later: it has the rows of before, and does not write while it does not lead.
        async with Measured(tmp_path, leads=False) as second:
            await until(lambda: found in second.recorder.rows(0.0), "the earlier rows are read")
            times = [one.unix_s for one in second.recorder.rows(0.0)]
            assert times == sorted(times)
            assert times[0] >= began - 1
            await until(lambda: len(second.recorder.rows(times[-1])) >= 2, "it measures")
            assert second.history.written == 0

    asyncio.run(main())


def test_strangers_and_junk_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with Measured(tmp_path) as measured, grpc.aio.insecure_channel(measured.address) as channel:
            call = channel.unary_unary(rpc.FIGURES_REPORT, response_deserializer=rpc.decode_taken)

            async def refused(message: bytes, token: str) -> grpc.StatusCode:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(message, metadata=(("authorization", f"Bearer {token}"),), timeout=10)
                return caught.value.code()

            none = Histogram(LATENCIES_S, (0,) * (len(LATENCIES_S) + 1))
            good = rpc.encode(GatewayReport("g1", "a", 1.0, 5, none, none))
            assert await refused(good, "wrong") is grpc.StatusCode.UNAUTHENTICATED
            assert await refused(b"junk", TOKEN) is grpc.StatusCode.INVALID_ARGUMENT
            odd = rpc.encode(GatewayReport("g1", "a", 1.0, 5, none, Histogram((1.0,), ())))
            assert await refused(odd, TOKEN) is grpc.StatusCode.INVALID_ARGUMENT
            assert measured.recorder.refused == 3
            await call(good, metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=10)

    asyncio.run(main())


def test_with_certificates_a_gateway_speaks_for_itself_alone(tmp_path: Path) -> None:
    c1, g1, n0 = (
        ProcessName(role, name)
        for role, name in (
            (ProcessRole.CONTROLLER, "c1"),
            (ProcessRole.GATEWAY, "g1"),
            (ProcessRole.NODE, "n0"),
        )
    )
    certs = folder(tmp_path / "certs", *((p.role, p.name) for p in (c1, g1, n0)), hosts=("127.0.0.1",))

    def identity(me: ProcessName) -> Identity:
        return Identity(settings(certs), CLUSTER, me)

    async def tell(address: str, sender: ProcessName, controller: str, as_name: str) -> int:
        """Failures of one report under the name `as_name`."""
        where = {controller: address}
        reporter = FiguresReporter(Member(as_name, "a"), TOKEN, Metrics(), lambda: where, identity(sender))
        await reporter._tell(controller, address, reporter.report())
        for channel in reporter._channels.values():
            await channel.close()
        return reporter.failures

    async def main() -> None:
        async with Measured(tmp_path, identity=identity(c1)) as measured:
            assert await tell(measured.address, g1, "c1", "g1") == 0
            assert measured.recorder.refused == 0
            assert await tell(measured.address, g1, "c1", "g2") == 1
            assert await tell(measured.address, n0, "c1", "n0") == 1
            assert measured.recorder.refused == 2
            # Nor does a gateway tell anything, its token least of all, to who is not the controller that it means.
            assert await tell(measured.address, g1, "c2", "g1") == 1
            assert measured.recorder.refused == 2

    asyncio.run(main())


def test_a_gateways_counts_as_they_are_told() -> None:
    metrics = Metrics()
    for seconds in (0.001, 0.25, 0.25, 1000.0):
        metrics.ttft.observe(seconds)
        metrics.tokens.waited(seconds)
    told = FiguresReporter(Member("g1", "a"), TOKEN, metrics, dict).report()
    assert told.first_token == told.inter_token
    assert told.first_token.sound
    at = LATENCIES_S.index(0.3)
    assert [told.first_token.counts[k] for k in (0, at, len(LATENCIES_S))] == [1, 2, 1]
    assert sum(told.first_token.counts) == 4
    assert rpc.decode_gateway_report(rpc.encode(told)) == told
