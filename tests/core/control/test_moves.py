"""A planned move: the copy, the switch, and how it ends otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec
import pytest
from msgspec.structs import replace

from controlplane.contract.events import EventKind
from controlplane.contract.ids import Member
from controlplane.contract.reports import LAG_UNKNOWN, PipelineReport, TargetReport
from controlplane.contract.schema import encode
from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Stage, Topology, switched
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


def test_copy_and_switch() -> None:
    world = moving()
    assert move(world) == Move(1, world.member("n1"), "hand-back", MovePhase.COPY)
    epoch = p0(world).epoch
    calm(world)
    world.lag = 2 * 16 * world.running + 1
    assert world.next() is None  # too far behind
    assert p0(world).epoch == epoch
    world.lag -= 1
    assert world.step() == "advance_moves"
    assert p0(world).move is None
    assert p0(world).epoch == p0(world).moved == world.topology.counter
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
    assert world.serving()["p0/1"] == "n1"


def test_a_mode_without_copies_switches_at_once() -> None:
    world = moving(Mode.NONE)
    calm(world)
    assert world.serving()["p0/1"] == "n1"


def test_a_node_of_other_numerics_gets_no_copies_and_is_switched_to_at_once() -> None:
    world = moving()
    calm(world)
    assert move(world).phase is MovePhase.COPY
    world.records["n1"] = replace(world.records["n1"], numerics="other")
    assert world.step() == "advance_moves"
    assert world.serving()["p0/1"] == "n1"


def spoil(change: Callable[[PipelineReport], PipelineReport]) -> bool:
    """Whether the switch happens although what the source reports of its copies was changed so."""
    world = moving()
    calm(world)
    world.lag = 0
    nodes = world.nodes()
    source = p0(world).stages[1].leader
    assert source is not None
    said = tuple(change(r) if r.pipeline == "p0" else r for r in nodes.reports[source].pipelines)
    changed = Nodes(
        nodes.views, nodes.dead, {**nodes.reports, source: replace(nodes.reports[source], pipelines=said)}
    )
    transition = plan(world.topology, changed, world.policy(), world.now)
    return transition is not None and transition.rule == "advance_moves"


def lags(tokens: int, behind_s: float = 0.0) -> Callable[[PipelineReport], PipelineReport]:
    return lambda r: replace(r, targets=tuple(TargetReport(t.target, tokens, behind_s) for t in r.targets))


def test_the_switch_needs_every_condition() -> None:
    assert spoil(lambda r: r)
    assert spoil(lags(2 * 16, LIMITS.behind_s))
    assert not spoil(lags(2 * 16 + 1))
    assert not spoil(lags(2 * 16, LIMITS.behind_s + 0.01))
    assert not spoil(lags(LAG_UNKNOWN))
    assert not spoil(lambda r: replace(r, targets=()))
    assert not spoil(lambda r: replace(r, epoch=r.epoch - 1))  # said before it had the copies that count


@pytest.mark.parametrize("victim", ["n1", "n3", "n0"])
def test_a_death_in_the_midst_ends_the_move_and_the_rest_is_repair(victim: str) -> None:
    world = moving()
    calm(world)
    assert move(world).phase is MovePhase.COPY
    world.lag = 0
    world.kill(victim)
    before = p0(world)
    assert world.step() in ("repair", "drop_dead")
    assert p0(world).move is None
    assert not switched(before, p0(world))
    world.settle()
    assert p0(world).up
    # The destination had a copy: if the source is dead, it is the one that goes on.
    expected = {"n1": ["n0", "n3"], "n3": ["n0", "n1"], "n0": ["n2", "n1"]}
    assert [s.leader.node for s in p0(world).stages if s.leader] == expected[victim]


def test_a_destination_that_dies_right_after_the_switch_leaves_the_copy_of_who_served_before() -> None:
    world = moving()
    calm(world)
    world.lag = 0
    assert world.step() == "advance_moves"
    assert world.copies()["p0/1"] == ["n3"]
    world.lag = LAG_UNKNOWN  # n1 has not heard from anybody what there is
    world.kill("n1")
    assert world.step() == "repair"
    assert world.serving()["p0/1"] == "n3"
    assert p0(world).moved < p0(world).epoch


def test_a_move_that_older_code_has_quiesced_copies_on_at_once_and_switches_when_it_is_near() -> None:
    """Older schedulers compute nothing meanwhile; what else the older leader wrote is none of our business."""
    world = moving()
    calm(world)
    quiesced = msgspec.json.decode(msgspec.json.encode(world.topology))
    quiesced["pipelines"][0]["move"] |= {"phase": "quiesce", "attempt": 2}
    world.topology = msgspec.convert(quiesced, Topology)
    assert move(world).phase is MovePhase.QUIESCE
    assert world.step() == "advance_moves"
    assert (move(world).phase, p0(world).epoch) == (MovePhase.COPY, quiesced["pipelines"][0]["epoch"])
    assert world.next() is None
    written = msgspec.json.decode(encode(world.topology, msgspec.json.encode(quiesced)))
    assert written["pipelines"][0]["move"]["attempt"] == 2
    world.lag = 0
    assert world.step() == "advance_moves"
    assert world.serving()["p0/1"] == "n1"


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
    calm(world)
    world.lag = 0
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
    calm(world)
    fresh = World(world.config)
    fresh.records, fresh.alive, fresh.topology = world.records, world.alive, copy.copy(world.topology)
    fresh.timers.note(fresh.topology, fresh.now)
    assert fresh.step() == "advance_moves"
    assert fresh.serving()["p0/1"] == "n1"


@pytest.mark.parametrize(
    ("phase", "moved", "by", "text"),
    [
        (MovePhase.COPY, True, "n1", "moved p0/1 to n1"),
        (MovePhase.COPY, False, "n1", "called off: p0/1 to n1"),  # who served died, and the copy took over
        (MovePhase.COPY, False, "n3", "called off: p0/1 to n1"),
        (MovePhase.QUIESCE, False, "n1", "moved p0/1 to n1"),  # by older code, which does not say
        (MovePhase.QUIESCE, False, "n3", "called off: p0/1 to n1"),
    ],
)
def test_history_tells_a_switch_from_a_death_in_the_midst_of_a_move(
    phase: MovePhase, moved: bool, by: str, text: str
) -> None:
    to = Member("n1", "b")

    def at(counter: int, serves: Member, move: Move | None = None) -> Topology:
        stages = (Stage(("n0",), (Member("n0", "a"),)), Stage(("n1",), (serves,)))
        pipeline = Pipeline("p0", counter, stages, move, moved=counter if moved and move is None else 0)
        return Topology("g", counter, Mode.REPLICATE, (pipeline,))

    before = at(1, Member("n9", "a"), Move(1, to, "hand-back", phase))
    told = of_topology(before, at(2, to if by == "n1" else Member(by, "a")), {}, 0.0)
    assert [event.message for event in told if event.kind is EventKind.MOVE] == [text]
