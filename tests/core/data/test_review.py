"""Defects that a review found, each with the scenario that showed it: leaks, stuck moves, copies thrown away."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from msgspec import structs

from controlplane.contract import rpc
from controlplane.contract.ids import Member
from controlplane.contract.records import ControllerRecord, NodeRecord
from controlplane.contract.reports import NodeReport
from controlplane.contract.requests import (
    RefusalCode,
    Refused,
    Sampling,
    SchedulerMessage,
    Submit,
    Token,
    Tokens,
)
from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Topology
from controlplane.contract.topology import Stage as StageDuty
from dataplane._fast.blocktable import Rows
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.events import (
    Ask,
    Cancelled,
    CapacityChanged,
    EpochBegan,
    Refuse,
    RunStep,
    Submitted,
    Tick,
)
from dataplane.core.messages import (
    Fence,
    HeldMeta,
    Meta,
    Ping,
    RejoinMeta,
    ResultMeta,
    StepFailedMeta,
)
from dataplane.core.replication import ReplicaSource
from dataplane.core.request import pack_tokens
from dataplane.core.scheduler import LINK_RETRY_S, STALL_LIMIT_S, Scheduler
from dataplane.core.stage import Stage
from dataplane.frontdoor import Frontdoor
from dataplane.node import Node
from dataplane.reporter import Reporter
from dataplane.schedulers import Schedulers
from dataplane.transport import frames
from dataplane.worker import Message
from tests.core.data.pipeline import Cluster

LIMITS = Limits(4, 16, 8, 8, 64, 0.5, 1000)
ME = Member("n0", "a")
NEXT = Member("n1", "a")


def midway(stages: int, seed: int) -> Cluster:
    """One request, some tokens in, its copies acknowledged."""
    cluster = Cluster(stages, seed)
    cluster.submit(1, list(range(40)), max_tokens=60)
    while len(cluster.received[1]) < 15:
        cluster.run(1)
    return cluster


def submitted(rid: int, prompt: tuple[int, ...] = (1, 2, 3, 4), **fields: object) -> Submitted:
    sampling = fields.pop("sampling", Sampling(8, seed=1))
    return Submitted(Submit(rid, "p0", prompt, sampling, **fields), session=1)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- copies and their accounts


def test_the_old_nodes_copy_survives_until_gateways_submit_again() -> None:
    """A hand-back of stage 0: the new node has promoted nothing yet when its holder says what it has."""
    cluster = midway(2, seed=1)
    old, new = cluster.serving[0], cluster.peers[0]
    cluster.epoch += 1
    cluster.serving[0], cluster.peers[0] = new, old
    cluster.nodes[old].leave(demote=True)
    cluster.apply_topology()
    cluster.scheduler = cluster.new_scheduler(takeover=True)
    cluster.perform(cluster.scheduler.start(cluster.now))
    cluster.run(20)
    sent = cluster.nodes[new].replicator.stats.blocks_sent
    assert ("p0", 1) in cluster.nodes[old].store.replicas
    cluster.resubmit_all()
    before = len(cluster.received[1])
    while len(cluster.received[1]) < before + 4:
        cluster.run(1)
    assert cluster.nodes[new].replicator.stats.blocks_sent - sent <= 4  # not the whole of it once more
    cluster.run_to_end()
    cluster.check()


def test_what_a_sweep_gives_back_is_given_back_by_the_holders_too() -> None:
    cluster = midway(2, seed=2)
    cluster.submitted.clear()  # the gateway is gone as well: nobody claims the request
    cluster.kill(0)
    for _ in range(60):
        cluster.run(20)
    for node in cluster.nodes.values():
        if node.alive:
            assert not any(node.store.own.values())
            assert not node.store.replicas
            assert all(
                not s._unacked for p in node.replicator._protected.values() for s in p.sources.values()
            )


def test_a_request_cancelled_while_its_stages_are_asked_leaves_nothing() -> None:
    """The order to free overtakes the question, which then promotes the copy of a dead request."""
    cluster = midway(3, seed=1)
    cluster.kill(2)
    slow = (cluster.serving[0], cluster.serving[2])
    question = cluster.links.pop(slow)
    cluster.dispatch(Cancelled(1))
    cluster.run(25)
    cluster.links[slow] = question
    cluster.run(100)
    assert not [m for m in cluster.serving if any(cluster.nodes[m].store.own.values())]


def test_an_acknowledgement_of_an_earlier_life_counts_for_nothing() -> None:
    tokens = {1: 8}
    made = ReplicaSource(NEXT, 4, lambda rid: tokens.get(rid, 0))
    made.must_ask(0.0)
    made.acknowledged((), whole=True, refused=False, now=0.0)
    made.wrote([1])
    assert len(made.take(0.0, flush=False)) == 2
    made.freed([1])  # preempted: the holder is told to drop it, and its last acknowledgement is on its way
    made.wrote([1])  # admitted again, computed again
    made.acknowledged(((1, 8),), whole=False, refused=False, now=0.1)
    assert made.lag_tokens([1], flush=False) == 8
    assert len(made.take(0.2, flush=False)) == 2


def test_an_answer_that_crossed_an_order_to_drop_counts_for_nothing() -> None:
    tokens = {1: 8, 2: 8}
    made = ReplicaSource(NEXT, 4, lambda rid: tokens.get(rid, 0))
    assert made.must_ask(0.0)
    made.freed([1])
    made.wrote([1])  # admitted again, computed again
    assert not made.acknowledged(((1, 8), (2, 8)), whole=True, refused=False, now=0.1)
    assert made.lag_tokens([1], flush=False) == 8
    assert made.lag_tokens([2], flush=False) == 0
    assert len(made.take(0.2, flush=False)) == 2


@pytest.mark.parametrize(("index", "tokens"), [(0, 100), (-1, 4), (3, 16), (0, 0), (0, -3)])
def test_a_copy_that_makes_no_sense_is_refused(index: int, tokens: int) -> None:
    store = KvStore(8, 4, 4, 3)
    for at in range(3):
        assert store.replica_block(("p0", 1), at, 4 * at + 4) is not None
        store.replica_written(("p0", 1), at, 4 * at + 4, 0)
    for rid in (1, 2):
        assert store.replica_block(("p0", rid), index, tokens) is None
        store.check()
    assert list(store.replicas) == [("p0", 1)]


def test_an_order_to_drop_that_could_not_be_sent_is_made_good() -> None:
    cluster = midway(2, seed=3)
    source = cluster.nodes[cluster.serving[1]]
    send, source.replicator._send = source.replicator._send, lambda *_: False  # the queue of the link is full
    cluster.dispatch(Cancelled(1))
    cluster.run(60)
    source.replicator._send = send
    for _ in range(60):
        cluster.run(20)
    assert not cluster.nodes[cluster.peers[1]].store.replicas


# ---------------------------------------------------------------------- rounds


def test_a_step_of_a_new_round_may_come_before_its_question() -> None:
    """Within the orphan grace frees go out at once. Stage and scheduler must agree on the last step after it,
    or no move of an idle pipeline ever finds a quiet moment."""
    made = Scheduler("p0", 5, 3, LIMITS, takeover=True, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    ask = next(e for e in made.start(0.0) if isinstance(e, Ask)).meta
    for index in range(3):
        made.step(HeldMeta("p0", ask.fence, ask.ask, index, ()), 0.1)
    step = next(e for e in made.step(submitted(1), 0.1) if isinstance(e, RunStep)).meta
    failed = StepFailedMeta("p0", step.fence, step.step, 0, "link")
    ask = next(e for e in made.step(failed, 0.2) if isinstance(e, Ask)).meta
    effects = made.step(Cancelled(1), 0.2 + LINK_RETRY_S)
    freeing = next(e for e in effects if isinstance(e, RunStep)).meta
    assert freeing.fence == ask.fence
    stage = Stage("p0", 2, 3, 5, KvStore(8, 4, 8, 8))
    stage.enter(Fence(5, 0))
    prepared = stage.prepare(freeing)
    assert not isinstance(prepared, str)
    stage.commit(prepared, None)
    stage.rejoin(ask, lambda _: 0)
    assert stage.last_step == freeing.step


def test_a_new_epoch_is_asked_again_as_soon_as_any() -> None:
    made = Scheduler("p0", 5, 2, LIMITS, takeover=False, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    made.step(submitted(1), 0.0)
    now = 0.0
    for _ in range(4):  # nobody answers: the patience doubles each time
        now += 70.0
        assert made.step(Tick(), now)
    made.step(EpochBegan(6, planned=False), now)
    again = made.step(Tick(), now + STALL_LIMIT_S + 0.1)
    assert next(e for e in again if isinstance(e, Ask)).meta.fence == Fence(6, 1)


# ---------------------------------------------------------------------- requests that no gateway should send


@pytest.mark.parametrize(
    "event",
    [
        submitted(2, (1, 1 << 40)),
        submitted(2, (1, 1000)),
        submitted(2, (-1, 1)),
        submitted(2, emitted=(1000,)),
        submitted(2, sampling=Sampling(8, seed=1, logit_bias=((1000, 1.0),))),
        submitted(2, sampling=Sampling(8, seed=1, min_tokens=1, stop_token_ids=(1000,))),
        submitted(2, sampling=Sampling(8, seed=1, min_p=2.0)),
    ],
)
def test_a_request_that_would_break_a_stage_is_refused_and_others_go_on(event: Submitted) -> None:
    made = Scheduler("p0", 5, 1, LIMITS, takeover=False, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    refused = [e for e in made.step(event, 0.0) if isinstance(e, Refuse)]
    assert refused[0].message.code is RefusalCode.INVALID
    step = next(e for e in made.step(submitted(1), 0.0) if isinstance(e, RunStep)).meta
    assert Rows(step.rows).rids.tolist() == [1]
    assert made.step(ResultMeta("p0", step.fence, step.step, pack_tokens([9])), 0.1)


# ---------------------------------------------------------------------- the schedulers of a node


def record(member: Member) -> NodeRecord:
    return NodeRecord(member, "g", 0, 2, "", "", "", 100, 4, 1)


RECORDS = {m.node: record(m) for m in (ME, NEXT)}


def pipeline(name: str, epoch: int, move: Move | None = None, last: Member = NEXT) -> Pipeline:
    return Pipeline(name, epoch, (StageDuty(("n0",), (ME,)), StageDuty(("n1",), (last,))), move)


def topology(counter: int, *pipelines: Pipeline) -> Topology:
    return Topology("g", counter, Mode.REPLICATE, pipelines)


class Host:
    """The schedulers of one node; `up` are the members that can be reached."""

    def __init__(self, *up: Member, microbatches: int = 0) -> None:
        self.up = set(up)
        self.local: list[Message] = []
        self.sent: list[tuple[Member, Meta]] = []
        self.told: list[tuple[int, SchedulerMessage]] = []
        frontdoor = Frontdoor("token", lambda *_: None, lambda _: None)
        frontdoor.send = lambda *message: self.told.append(message)  # type: ignore[method-assign]
        self.schedulers = Schedulers(
            ME, LIMITS, microbatches, frontdoor, self.local.append, self.send, lambda: None
        )

    def send(self, peer: Member, meta: Meta, _payload: object) -> bool:
        if peer in self.up:
            self.sent.append((peer, meta))
        return peer in self.up


def test_questions_of_one_pipeline_outlive_a_new_epoch_of_another() -> None:
    host = Host(ME)
    host.schedulers.on_topology(topology(1, pipeline("p0", 1), pipeline("p1", 1)), RECORDS)
    host.schedulers.on_topology(topology(2, pipeline("p0", 2), pipeline("p1", 1)), RECORDS)
    host.up.add(NEXT)
    host.schedulers.on_link_up(NEXT)
    asked = [(m.pipeline, m.fence) for to, m in host.sent if to == NEXT and isinstance(m, RejoinMeta)]
    assert ("p1", Fence(1)) in asked
    assert ("p0", Fence(2)) in asked
    assert ("p0", Fence(1)) not in asked


def test_registrations_that_are_gone_do_not_shrink_the_pool_to_nothing() -> None:
    """etcd was away, every lease ran out, and the topology changes before the nodes are back in it."""
    host = Host(ME, NEXT)
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)
    assert host.schedulers.by_pipeline["p0"].batcher.quota_blocks == 50
    host.schedulers.on_topology(topology(2, pipeline("p0", 1)), {})
    assert host.schedulers.by_pipeline["p0"].batcher.quota_blocks == 50


@pytest.mark.parametrize(
    ("hosts", "parallel", "setting", "expected"),
    [
        (("a", "a"), 1, 0, 1),  # two nodes that share one core
        (("a", "a"), 2, 0, 2),
        (("a", "a"), 9, 0, 2),
        (("a", "b"), 1, 0, 2),  # a core each
        (("a", "b"), 1, 7, 7),  # who sets it gets it
    ],
)
def test_as_many_microbatches_as_the_hosts_can_compute(
    hosts: tuple[str, str], parallel: int, setting: int, expected: int
) -> None:
    host = Host(ME, NEXT, microbatches=setting)
    records = {
        member.node: structs.replace(record(member), fault_domain={"host": name}, host_parallel=parallel)
        for member, name in zip((ME, NEXT), hosts, strict=True)
    }
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), records)
    assert host.schedulers.by_pipeline["p0"].batcher.microbatches == expected


def test_requests_of_a_scheduler_that_ends_and_begins_again_are_not_waited_for_in_vain() -> None:
    """The gateway is ahead: what it submits for epoch 3 reaches the scheduler of epoch 1, which 2 puts an end to."""
    host = Host(ME, NEXT)
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)
    host.schedulers.on_gateway(7, submitted(1).message)
    down = Pipeline("p0", 2, (StageDuty(("n0",), (ME,)), StageDuty(("n1",))))
    host.schedulers.on_topology(topology(2, down), RECORDS)
    host.schedulers.on_topology(topology(3, pipeline("p0", 3)), RECORDS)
    assert not host.schedulers.by_pipeline["p0"].requests
    told = [(s, m.rid, m.pipeline, m.code) for s, m in host.told if isinstance(m, Refused)]
    assert told == [(7, 1, "p0", RefusalCode.DROPPED)]


def test_a_planned_switch_issues_nothing_in_the_epoch_that_is_over() -> None:
    host = Host(ME, NEXT)
    other = Member("n3", "a")
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)
    scheduler = host.schedulers.by_pipeline["p0"]
    host.schedulers.on_message(HeldMeta("p0", Fence(1), 0, 0, ()))
    host.schedulers.on_message(HeldMeta("p0", Fence(1), 0, 1, ()))
    move = Move(1, other, MovePhase.QUIESCE, "hand-back")
    host.schedulers.on_topology(topology(2, pipeline("p0", 1, move)), RECORDS)
    host.schedulers.on_gateway(1, submitted(1).message)
    assert scheduler.quiesced_step == -1
    host.schedulers.on_topology(topology(3, pipeline("p0", 3, None, other)), RECORDS)
    assert not host.local


# ---------------------------------------------------------------------- links and streams


class Connected:
    """A transport whose links to others stand."""

    def connected(self, _peer: Member) -> bool:
        return True


def test_a_peer_whose_link_to_us_is_back_is_not_reported_as_down_for_ever() -> None:
    """Only links that we open announce that they are up; a stale "down" would make a late report a death."""
    node = Node.__new__(Node)
    node._transport = Connected()  # type: ignore[assignment]
    node._down = {NEXT: "incoming link: reset", Member("n2", "a"): "outgoing link: reset"}
    node._on_message(NEXT, memoryview(frames.join(frames.encode(Ping()))))
    assert list(node._down) == [Member("n2", "a")]


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
