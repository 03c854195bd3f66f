"""The simulation of `bench failsafe`: what it counts must be right before what it says can be."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.failsafe_model import EXACT_SUM_BYTES, FLOAT_SUM_BYTES, LLAMA_70B, MIXTRAL_8X22B, Cost, Model, Work
from bench.failsafe_systems import START_S, Ours, Standard, restart_s, shape_of
from bench.failsafe_traces import Event, FaultTrace, Group, Lengths, fault_trace, spot_trace
from bench.failsafe_whole import Rates, whole_trace
from kernels.ranks.layout import first_layout

SMALL = Model("small", 4, 32768, 64, 8, 131072, 32000)
LENGTHS = [Lengths(500 + 700 * (number % 5), 20 + number % 30) for number in range(50)]
ALL = frozenset(range(8))


def test_models_have_the_size_of_the_published_ones() -> None:
    assert LLAMA_70B.weight_bytes == pytest.approx(2 * 70.6e9, rel=0.01)
    assert MIXTRAL_8X22B.weight_bytes == pytest.approx(2 * 140.6e9, rel=0.01)


def test_a_step_takes_as_long_as_its_slowest_rank_and_exact_sums_cost_more() -> None:
    cost = Cost(LLAMA_70B, first_layout(shape_of(LLAMA_70B), 7), FLOAT_SUM_BYTES)
    even = {rank: Work(1000, 500_000.0) for rank in range(7)}
    one = {0: Work(7000, 3_500_000.0)}
    assert cost.step(one, 0).compute_s > cost.step(even, 0).compute_s
    assert cost.step(one, 0).compute_mean_s == pytest.approx(cost.step(even, 0).compute_mean_s)
    exact = Cost(LLAMA_70B, first_layout(shape_of(LLAMA_70B), 7), EXACT_SUM_BYTES)
    assert exact.step(even, 0).seconds > cost.step(even, 0).seconds
    with_room = [
        Cost(LLAMA_70B, first_layout(shape_of(LLAMA_70B), n), FLOAT_SUM_BYTES).fits for n in (1, 2, 3, 8)
    ]
    assert with_room == [False, True, True, True]


def served_of(run: Ours | Standard) -> tuple[int, int]:
    """What was counted, and what the requests that ended and those under way add up to."""
    outcome = run.run()
    run.engine.running()
    under_way = sum(each.computed + (each.generated > 0) for each in run.engine.requests.values())
    return outcome.served.tokens, sum(outcome.served.completed.values()) + under_way


@pytest.mark.parametrize("shelf", [True, False])
def test_tokens_are_counted_once_whatever_is_lost_and_computed_again(shelf: bool) -> None:
    events = (
        Event(5.0, 3, False), Event(9.0, 6, False), Event(9.0, 1, False), Event(11.0, 3, True), Event(60.0, 0, False),
        Event(80.0, 6, True),
    )  # fmt: skip
    run = Ours(SMALL, LENGTHS, Group(ALL, events), 90.0, shelf=shelf)
    counted, added = served_of(run)
    assert counted == added
    assert len(run.outcome.pauses) == 3
    assert set(run.engine.layout.ranks) == {2, 3, 4, 5, 7}  # rank 6 is still starting
    assert run.outcome.down_s == 0.0


def test_standard_restarts_with_half_and_begins_again() -> None:
    group = Group(ALL, (Event(5.0, 3, False), Event(10.0, 2, False), Event(100.0, 3, True)))
    run = Standard(SMALL, LENGTHS, group, 120.0, grows=True)
    counted, added = served_of(run)
    assert counted == added
    assert len(run.engine.layout.ranks) == 4
    # Rank 2 is one of the four that a restart had begun with: it begins anew with others.
    assert run.outcome.restarts == 2
    assert run.outcome.down_s == pytest.approx(5.0 + restart_s(SMALL), abs=1.0)


def test_a_lost_rank_costs_less_when_the_shelf_has_its_kv() -> None:
    group = Group(ALL, tuple(Event(10.0 + 5 * rank, rank, False) for rank in range(4)))
    with_shelf, without = (Ours(SMALL, LENGTHS, group, 40.0, shelf=shelf).run() for shelf in (True, False))
    assert with_shelf.served.tokens > without.served.tokens


def test_faults_of_a_node_that_overlap_are_one(tmp_path: Path) -> None:
    rows = [
        ("a", 1.0, "fault_start"),
        ("a", 2.0, "fault_start"),
        ("a", 3.0, "fault_end"),
        ("a", 4.0, "fault_end"),
    ]
    (tmp_path / "infinitehbd_faults.json").write_bytes(
        msgspec.json.encode([{"node_id": n, "event_time": t, "event_type": e} for n, t, e in rows])
    )
    trace = fault_trace(tmp_path, nodes=16)
    events = [event for group in trace.groups for event in group.events]
    assert [(event.at_s, event.up) for event in events] == [(86_400.0, False), (4 * 86_400.0, True)]
    part = trace.window(2 * 86_400.0, 3 * 86_400.0)
    assert sorted(len(group.up) for group in part.groups) == [7, 8]


def test_spot_nodes_fill_places_of_groups(tmp_path: Path) -> None:
    lines = [f"{1000 * number},add,n{number}" for number in range(9)] + ["20000,remove,n2", "21000,add,n9"]
    (tmp_path / "spot.csv").write_text("\n".join(lines) + "\n")
    (group,) = spot_trace(tmp_path, "spot.csv", "spot").groups
    assert [event.up for event in group.events] == [True] * 8 + [False, True]  # the ninth found no place
    assert group.events[-1].rank == group.events[-2].rank


def test_a_rank_that_is_lost_before_it_has_started_never_serves() -> None:
    """Traces have whole minutes: it is lost at the very moment at which it would be ready."""
    events = (Event(0.0, 0, False), Event(30.0, 0, True), Event(30.0 + START_S, 0, False))
    trace = FaultTrace("minutes", 1000.0, (Group(frozenset(range(8)), events),))
    rates = Rates(*({ranks: 100.0 * ranks for ranks in (2, 4, 7, 8)} for _ in range(3)), {})
    row = whole_trace(trace, LLAMA_70B, rates)
    assert row["whole_ours"] == pytest.approx(700.0, rel=0.002)
    assert float(row["factor_changes"]) <= 1.0
    assert float(row["ceiling_ratio"]) >= float(row["factor_restarts"]) * float(row["factor_idle_ranks"])
