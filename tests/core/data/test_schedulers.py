"""The schedulers of a node while the topology changes."""

from __future__ import annotations

import pytest
from msgspec import structs

from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord
from controlplane.contract.requests import RefusalCode, Refused, SchedulerMessage, Submit
from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Topology
from controlplane.contract.topology import Stage as StageDuty
from dataplane.core.messages import Fence, HeldMeta, Meta, RejoinMeta, StepMeta
from dataplane.frontdoor import Frontdoor
from dataplane.schedulers import CRASHES_MAX, Schedulers
from dataplane.worker import Message
from tests.core.control.sim import formed
from tests.core.control.test_blemishes import SPOILS, Spoil
from tests.core.data.parts import LIMITS, ME, NEXT, submitted


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


@pytest.mark.parametrize("mode", [Mode.REPLICATE, Mode.LOAD_AWARE])
@pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__ for spoil in SPOILS])
def test_a_blemish_in_p0_ends_no_scheduler_of_p1(spoil: Spoil, mode: Mode) -> None:
    """Here the node that schedules p1 is ours."""
    sim = formed(3, 4, controllers=1)
    assert sim.topology is not None
    p0, p1, p2 = sim.topology.pipelines
    ours = structs.replace(p1.stages[0], homes=(ME.node,), ranks=(ME,))
    p1 = structs.replace(p1, stages=(ours, *p1.stages[1:]))
    host = Host(ME)
    for counter, first in ((1, p0), (2, spoil(sim, p0))):
        host.schedulers.on_topology(Topology("g", counter, mode, (first, p1, p2)), RECORDS)
        assert "p1" in host.schedulers.by_pipeline


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("phase", "moved", "target_serves", "planned"),
    [
        (MovePhase.COPY, 2, True, True),
        (MovePhase.COPY, 0, True, False),  # who served died, and its copy took over
        (MovePhase.COPY, 1, True, False),  # the same, after an earlier move
        (MovePhase.QUIESCE, 0, True, True),  # by older code, which does not say
        (MovePhase.QUIESCE, 0, False, False),  # another one took over
        (None, 0, True, False),
    ],
)
def test_only_the_switch_of_a_move_is_a_planned_recovery(
    stage: int, phase: MovePhase | None, moved: int, target_serves: bool, planned: bool
) -> None:
    """Also where it is the scheduler that moved: here, from a member that is not asked."""
    host = Host(ME, NEXT)
    other, third = Member("n8", "i8"), Member("n9", "i9")
    homes, duties = ("n0", "n1"), [ME, NEXT]
    to = duties[stage] if stage == 0 else other
    duties[stage] = other if stage == 0 else NEXT

    def at(epoch: int, members: list[Member], move: Move | None = None, moved: int = 0) -> Pipeline:
        stages = (StageDuty((home,), (member,)) for home, member in zip(homes, members, strict=True))
        return Pipeline("p0", epoch, tuple(stages), move, moved=moved)

    move = None if phase is None else Move(stage if target_serves else 1 - stage, to, "hand-back", phase)
    host.schedulers.on_topology(topology(1, at(1, duties, move)), RECORDS)
    duties[stage] = to if target_serves or stage == 0 else third
    host.schedulers.on_topology(topology(2, at(2, duties, moved=moved)), RECORDS)
    recovery = host.schedulers.by_pipeline["p0"]._recovery
    assert recovery is not None
    assert recovery.planned is planned


def test_registrations_that_are_gone_do_not_shrink_the_pool_to_nothing() -> None:
    """etcd was away, every lease ran out, and the topology changes before the nodes are back in it. All of the pool, as
    there is nobody to copy to.
    """
    host = Host(ME, NEXT)
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)
    assert host.schedulers.by_pipeline["p0"].batcher.quota_blocks == 100
    host.schedulers.on_topology(topology(2, pipeline("p0", 1)), {})
    assert host.schedulers.by_pipeline["p0"].batcher.quota_blocks == 100


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


def odd(rid: int) -> Submit:
    """A request that the scheduler chokes on: its priority has no order."""
    return structs.replace(submitted(rid).message, priority="high")


def test_a_request_that_the_scheduler_chokes_on_goes_and_the_others_stay() -> None:
    host = Host(ME, NEXT)
    schedulers = host.schedulers
    schedulers.on_topology(topology(1, pipeline("p0", 1), pipeline("p1", 1)), RECORDS)
    other = schedulers.by_pipeline["p1"]
    for rid in range(1, 4):
        schedulers.on_gateway(7, submitted(rid).message)
    assert not host.told
    schedulers.on_gateway(7, odd(99))
    poisoned, *dropped = [m for _, m in host.told if isinstance(m, Refused)]
    assert (poisoned.rid, poisoned.code, poisoned.node) == (99, RefusalCode.POISONED, ME.node)
    # What it knew is with the gateways and stages: they are told to bring it, to one that starts afresh.
    assert {m.code for m in dropped} == {RefusalCode.DROPPED}
    assert {m.rid for m in dropped} == set(range(1, 4)), "each once, the odd one not again"
    fresh = schedulers.by_pipeline["p0"]
    assert fresh.fence == Fence(1, 1), "steps of the broken one are void"
    assert fresh.batcher.quota_blocks == 50
    assert [m.fence for to, m in host.sent if to == NEXT and isinstance(m, RejoinMeta)][-1] == Fence(1, 1)
    assert schedulers.by_pipeline["p1"] is other
    assert schedulers.counters()["crashes"] == 1
    schedulers.on_gateway(7, structs.replace(submitted(1).message, admitted=True))
    assert 1 in fresh.requests


def test_a_scheduler_that_chokes_again_and_again_ends_its_node() -> None:
    """Nothing here mends that: another node, or fresh code, may."""
    host = Host(ME, NEXT)
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)

    def choke() -> None:
        for rid in range(2):
            host.schedulers.on_gateway(7, submitted(rid).message)
        host.schedulers.on_gateway(7, odd(99))

    for _ in range(CRASHES_MAX):
        choke()
    with pytest.raises(TypeError):
        choke()


def test_a_move_is_served_through_and_nothing_is_issued_in_the_epoch_that_is_over() -> None:
    host = Host(ME, NEXT)
    other = Member("n3", "a")
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)
    scheduler = host.schedulers.by_pipeline["p0"]
    host.schedulers.on_message(HeldMeta("p0", Fence(1), 0, 0, ()))
    host.schedulers.on_message(HeldMeta("p0", Fence(1), 0, 1, ()))
    move = Move(1, other, "hand-back")
    host.schedulers.on_topology(topology(2, pipeline("p0", 1, move)), RECORDS)
    host.schedulers.on_gateway(1, submitted(1).message)
    issued = [message.meta.fence for message in host.local if isinstance(message.meta, StepMeta)]
    assert issued == [Fence(1)]
    host.schedulers.on_topology(topology(3, pipeline("p0", 3, None, other)), RECORDS)
    assert scheduler.fence == Fence(3)
    host.schedulers.on_gateway(1, submitted(2).message)
    assert [message.meta.fence for message in host.local if isinstance(message.meta, StepMeta)] == issued


def test_a_scheduler_that_takes_over_knows_how_long_steps_take_here() -> None:
    host = Host(ME, NEXT)
    host.schedulers.on_topology(topology(1, pipeline("p0", 1)), RECORDS)
    known = host.schedulers.by_pipeline["p0"].batcher.speed
    known.ran(4, 0, 0.2, beside_chunk=False)
    known.ran(4, 64, 1.4, beside_chunk=False)
    assert known.chunk_tokens(4, 512) == 16
    host.schedulers.on_topology(topology(2, pipeline("p0", 1), pipeline("p1", 1)), RECORDS)
    assert host.schedulers.by_pipeline["p1"].batcher.speed.chunk_tokens(4, 512) == 16
