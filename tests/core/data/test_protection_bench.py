"""What `bench protection` makes of what it measured: shares, costs, waits, predictions."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.contract import Result
from bench.kevlarflow_load import Outcome, Request
from bench.protection import LIVE, LONG, costs, fill_incidents, fill_memory, in_turn
from bench.protection_incident import STILL_S, Row, Shape, parts_of, slowest_s, still
from bench.protection_setup import (
    NONE,
    POSITIONS,
    REPLICATE,
    REPLICATE8,
    RS41,
    RS82,
    XOR41,
    long_model,
    requests_of,
)
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.ids import NodeId, PipelineId
from controlplane.contract.incidents import Affected, Incident
from dataplane.demo import model_dir
from dataplane.model.config import load_config

REQUEST = Request(0.0, (1, 2, 3), 8, 1)
ROW = Row("none", Shape(1, LONG, 2), "n2", 1, LONG + 4, 0, 4.0, 4.0, LONG + 4)


def stream(*times: float) -> Outcome:
    return Outcome(REQUEST, 0.0, list(range(len(times))), list(times))


def test_shares_are_of_copies_of_as_many_stages() -> None:
    result = Result("protection")
    fill_memory(result, {REPLICATE: 1000, XOR41: 250, RS41: 255, REPLICATE8: 2000, RS82: 500})
    assert result.metrics["memory_xor41_share"] == 0.25
    assert result.metrics["memory_rs41_share"] == 0.255
    assert result.metrics["memory_rs82_share"] == 0.25
    assert result.metrics["memory_share_error"] == pytest.approx(0.02)  # of rs41, the worst
    assert "memory_replicate8_share" not in result.metrics


def test_less_parity_than_k_of_n_is_an_error_too() -> None:
    result = Result("protection")
    fill_memory(result, {REPLICATE: 1000, XOR41: 200})
    assert result.metrics["memory_share_error"] == pytest.approx(0.2)


def test_costs_are_pair_by_pair() -> None:
    assert costs([1.02, 2.0], [1.0, 2.5]) == pytest.approx([0.02, -0.2])


def test_each_policy_is_first_in_turn() -> None:
    assert [in_turn(LIVE, number)[0] for number in range(4)] == [*LIVE, LIVE[0]]
    assert all(sorted(in_turn(LIVE, number), key=LIVE.index) == list(LIVE) for number in range(4))


def test_a_token_that_was_on_its_way_does_not_end_the_wait() -> None:
    assert slowest_s([stream(1.0, 2.0, 2.1, 5.0, 5.5)], killed=2.05, interrupted=1) == pytest.approx(2.95)


def test_a_later_pause_is_not_the_failures() -> None:
    assert slowest_s([stream(1.0, 2.0, 3.5, 3.6, 9.0)], killed=2.5, interrupted=1) == pytest.approx(1.0)


def test_only_streams_that_waited_longest_were_interrupted() -> None:
    # The calm one waited less, and its wait ended last.
    calm, hit, late = stream(1.0, 1.6, 2.55), stream(1.0, 2.5, 2.6), stream(1.0, 2.52, 2.6)
    assert slowest_s([calm, hit], killed=1.5, interrupted=1) == pytest.approx(1.0)
    assert slowest_s([calm, hit, late], killed=1.5, interrupted=2) == pytest.approx(1.02)


def test_a_kill_after_the_last_token_measures_nothing() -> None:
    with pytest.raises(KevlarFlowError, match="too late"):
        slowest_s([stream(1.0, 2.0)], killed=3.0, interrupted=1)


@pytest.mark.parametrize(
    ("predicted", "within"),
    [(4.0, True), (3.01, True), (4.99, True), (2.99, False), (5.01, False), (None, False)],
)
def test_a_prediction_is_within_a_quarter_of_what_was_measured(predicted: float | None, within: bool) -> None:
    assert replace(ROW, predicted_s=predicted).within is within


def test_what_incidents_come_to() -> None:
    rows = [
        ROW,
        replace(ROW, measured_s=6.0, predicted_s=None),
        replace(ROW, policy="replicate", measured_s=0.5, predicted_s=0.55),
        replace(ROW, policy="xor41", measured_s=1.0, predicted_s=0.2),
        replace(ROW, policy="xor41", shape=Shape(4, 1024, 0), measured_s=9.0, predicted_s=9.0),
    ]
    result = Result("protection")
    fill_incidents(result, rows)
    assert result.baseline["recovery_16k_none_s"] == 5.0
    assert result.ratios == {
        "recovery_16k_replicate": 10.0,
        "recovery_16k_xor41": 5.0,
    }  # the short ones do not count
    assert result.metrics["predicted_within_share"] == 3 / 5
    assert result.metrics["predicted_within_none"] == result.metrics["predicted_within_xor41"] == 1 / 2
    assert result.metrics["predicted_off_p90"] == pytest.approx(0.8)
    assert [row["mode"] for row in result.rows] == ["none", "none", "replicate", "xor41", "xor41"]
    assert "predicted_s" not in result.rows[1]


def test_what_changes_meanwhile_is_not_believed_yet() -> None:
    said, began = iter([0, 100, 75, 75]), time.monotonic()
    assert still(lambda: next(said, 128), "anything") == 128
    assert time.monotonic() - began >= STILL_S


def test_parts_are_those_of_the_pipeline_that_came_back_last() -> None:
    parts = (0.01, 0.1, 0.0, 0.3)
    quick = Affected(PipelineId("p0"), 2, "", 0.01, 0.02, 0.0, 0.1, ended_unix_s=10.0)
    slow = Affected(PipelineId("p1"), 2, "", *parts, ended_unix_s=11.0)
    found = parts_of(Incident(1, NodeId("n1"), "a", "", 9.0, 0.02, (quick, slow)))
    assert found == dict(
        zip(("detect", "plan", "connect", "restore", "first_token"), (0.02, *parts), strict=True)
    )


def test_prompts_are_new_each_time_and_the_same_again() -> None:
    first, again, other = (requests_of(2, 64, 4, seed) for seed in (1, 1, 2))
    assert first == again
    assert len({each.prompt for each in (*first, *other)}) == 4
    assert len({each.seed for each in (*first, *other)}) == 4


def test_the_emulated_model_takes_the_long_request() -> None:
    with long_model() as folder:
        assert load_config(folder).max_positions == POSITIONS > LONG
        assert folder.name == model_dir().name
    assert not Path(folder).exists()


def test_parity_is_to_take_k_of_n() -> None:
    assert (XOR41.share, RS41.share, RS82.share) == (0.25, 0.25, 0.25)
    assert NONE.stages == REPLICATE.stages == XOR41.stages
