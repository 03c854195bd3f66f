"""The phases of a planned move, and how it ends otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from controlplane.contract.events import EventKind
from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, PipelineReport
from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Stage, Topology
from controlplane.core.membership import Nodes
from controlplane.core.narrate import of_topology
from controlplane.core.plan import plan
from tests.core.control.world import LIMITS, World, make_config


def moving(mode: Mode = Mode.REPLICATE) -> World:
    """p0/1 was borrowed from n3, n1 came back, and its hand-back has just begun."""
    world = World(make_config(2, 2, mode=mode))
    world.settle()
    world.kill("n1")
    world.step()
    world.start("n1")
    world.lag = 10_000
    while world.topology.pipelines[0].move is None:
        assert world.step() is not None
    return world


def p0(world: World) -> Pipeline:
    return world.topology.pipelines[0]


def move(world: World) -> Move:
    found = p0(world).move
    assert found is not None
    return found


def calm(world: World) -> None:
    """Let steps that are not about the move pass."""
    while world.next() is not None and world.step() != "advance_moves":
        pass


def settled(world: World) -> None:
    """All other steps are taken, and the move does not advance."""
    while (rule := world.step()) is not None:
        assert rule != "advance_moves"


def test_copy_quiesce_switch() -> None:
    world = moving()
    assert (move(world).phase, move(world).to, move(world).reason) == (
        MovePhase.COPY,
        world.member("n1"),
        "hand-back",
    )
    epoch = p0(world).epoch
    calm(world)
    assert move(world).phase is MovePhase.COPY  # too far behind
    world.lag = 2 * 16 * world.running
    assert world.step() == "advance_moves"
    assert move(world).phase is MovePhase.QUIESCE
    assert p0(world).epoch == epoch
    assert world.next() is None  # not a token may be missing
    world.lag = 0
    assert world.step() == "advance_moves"
    assert p0(world).move is None
    assert p0(world).epoch == world.topology.counter
    assert world.serving()["p0/1"] == "n1"
    assert world.copies()["p0/1"] == ["n3"]  # who served until now has everything


def test_an_idle_pipeline_needs_a_complete_copy() -> None:
    world = moving()
    world.running = 0
    world.lag = 1
    calm(world)
    assert move(world).phase is MovePhase.COPY
    world.lag = 0
    assert world.step() == "advance_moves"
    assert move(world).phase is MovePhase.QUIESCE


def test_a_mode_without_copies_quiesces_at_once() -> None:
    world = moving(Mode.NONE)
    calm(world)
    calm(world)
    assert world.serving()["p0/1"] == "n1"


def test_a_quiesce_that_does_not_end_is_called_off_and_tried_after_growing_pauses() -> None:
    world = moving()
    world.lag, world.quiet = 0, False
    calm(world)
    pauses = []
    for attempt in range(1, 8):
        assert move(world).phase is MovePhase.QUIESCE
        settled(world)
        world.now += world.config.timing.quiesce_limit_s
        assert world.step() == "advance_moves"
        assert (move(world).phase, move(world).attempt) == (MovePhase.COPY, attempt)
        since = world.now
        while world.step() != "advance_moves":
            world.now += 0.5
        pauses.append(world.now - since)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    world.quiet = True
    assert world.step() == "advance_moves"
    assert world.serving()["p0/1"] == "n1"


def spoil(
    change_first: Callable[[PipelineReport], PipelineReport] = lambda r: r,
    change_source: Callable[[PipelineReport], PipelineReport] = lambda r: r,
    behind: int = 0,
) -> bool:
    """Whether the switch happens although the reports of a quiescing world were changed so."""
    world = moving()
    world.lag = 0
    calm(world)
    assert move(world).phase is MovePhase.QUIESCE
    nodes = world.nodes()
    reports: dict[object, NodeReport] = {}
    for member, report in nodes.reports.items():
        said = tuple(
            (change_first(r) if r.stage == 0 else change_source(r)) if r.pipeline == "p0" else r
            for r in report.pipelines
        )
        reports[member] = replace(report, pipelines=said, topology_counter=report.topology_counter - behind)
    changed = Nodes(nodes.views, nodes.dead, reports)  # type: ignore[arg-type]
    transition = plan(world.topology, changed, world.policy(), world.now)
    return transition is not None and transition.rule == "advance_moves"


def test_the_switch_needs_every_condition() -> None:
    assert spoil()
    assert not spoil(change_first=lambda r: replace(r, quiesced_step=-2))
    assert not spoil(change_first=lambda r: replace(r, quiesced_step=8))
    assert not spoil(change_source=lambda r: replace(r, last_step=6))
    assert not spoil(change_source=lambda r: replace(r, epoch=r.epoch - 1))
    assert not spoil(change_source=lambda r: replace(r, targets=()))
    assert not spoil(behind=1)  # said before they knew of the quiescing


def test_a_pipeline_that_never_issued_a_step_can_switch() -> None:
    idle = {"quiesced_step": -1, "last_step": -1}
    assert spoil(lambda r: replace(r, **idle), lambda r: replace(r, last_step=-1))


@pytest.mark.parametrize("phase", [MovePhase.COPY, MovePhase.QUIESCE])
@pytest.mark.parametrize("victim", ["n1", "n3", "n0"])
def test_a_death_in_the_midst_ends_the_move_and_the_rest_is_repair(phase: MovePhase, victim: str) -> None:
    world = moving()
    calm(world)
    if phase is MovePhase.QUIESCE:
        world.lag, world.quiet = 0, False
        calm(world)
    assert move(world).phase is phase
    world.lag, world.quiet = 0, True
    world.kill(victim)
    world.settle()
    assert p0(world).move is None
    assert p0(world).up
    # The destination had a copy: if the source is dead, it is the one that goes on.
    expected = {"n1": ["n0", "n3"], "n3": ["n0", "n1"], "n0": ["n2", "n1"]}
    assert [s.leader.node for s in p0(world).stages if s.leader] == expected[victim]


def test_a_copy_that_never_ends_is_called_off_and_not_begun_again_at_once() -> None:
    world = moving()
    calm(world)
    world.now += LIMITS.copy_limit_s
    assert world.step() == "advance_moves"
    assert p0(world).move is None
    assert world.next() is None
    world.now += LIMITS.bar_s
    assert world.step() == "start_move"


def test_a_suspected_destination_is_not_switched_to() -> None:
    world = moving()
    world.lag = 0
    calm(world)
    world.yellow.add("n1")
    assert world.next() is None
    world.yellow.clear()
    assert world.step() == "advance_moves"


def test_no_more_moves_at_once_than_allowed() -> None:
    world = World(make_config(4, 2))
    world.settle()
    world.kill("n0", "n2", "n4")
    world.settle()
    for node in ("n0", "n2", "n4"):
        world.start(node)
    most = 0
    world.lag = 10_000
    for _ in range(40):
        world.step()
        world.now += 0.5
        most = max(most, sum(p.move is not None for p in world.topology.pipelines))
    assert most == LIMITS.moves_max
    world.lag = 0
    world.settle()
    assert world.all_home()


def test_a_new_leader_goes_on_from_the_topology_alone() -> None:
    world = moving()
    world.lag = 0
    calm(world)
    fresh = World(world.config)
    fresh.records, fresh.alive, fresh.topology = world.records, world.alive, copy.copy(world.topology)
    fresh.timers.note(fresh.topology, fresh.now)
    assert fresh.step() == "advance_moves"
    assert fresh.serving()["p0/1"] == "n1"


@pytest.mark.parametrize(
    ("phase", "by", "text"),
    [
        (MovePhase.QUIESCE, "n1", "moved p0/1 to n1"),
        (MovePhase.COPY, "n1", "called off: p0/1 to n1"),  # who served died, and the copy took over
        (MovePhase.QUIESCE, "n3", "called off: p0/1 to n1"),
    ],
)
def test_history_tells_a_switch_from_a_death_in_the_midst_of_a_move(
    phase: MovePhase, by: str, text: str
) -> None:
    to = Member("n1", "b")

    def at(counter: int, serves: Member, move: Move | None = None) -> Topology:
        stages = (Stage(("n0",), (Member("n0", "a"),)), Stage(("n1",), (serves,)))
        return Topology("g", counter, Mode.REPLICATE, (Pipeline("p0", counter, stages, move),))

    before = at(1, Member("n9", "a"), Move(1, to, phase, "hand-back"))
    told = of_topology(before, at(2, to if by == "n1" else Member(by, "a")), {}, 0.0)
    assert [event.message for event in told if event.kind is EventKind.MOVE] == [text]
