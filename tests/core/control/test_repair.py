"""What repairs are said to cost, and what is chosen by it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.repair import (
    PREFERRED_SHARE,
    Computing,
    Restoring,
    computed_again,
    middle,
    repair_s,
)

BLOCK = 16
COMPUTING = Computing(step_s=0.1, token_s=0.002, pace_s=0.001, chunk_tokens=100)
RESTORING = Restoring(wait_s=0.05, block_s=0.004)


def test_the_middle_is_where_half_of_the_weight_is() -> None:
    assert middle([]) == 0.0
    assert middle([(3.0, 1), (1.0, 1), (2.0, 1)]) == 2.0
    assert middle([(1.0, 1), (2.0, 1), (9.0, 8)]) == 9.0


def test_chunks_behind_the_first_follow_at_the_pace_of_the_slowest_stage() -> None:
    assert COMPUTING.wait_s(0) == pytest.approx(0.1)
    assert COMPUTING.wait_s(50) == pytest.approx(0.1 + 50 * 0.002)
    assert COMPUTING.wait_s(300) == pytest.approx(0.1 + 100 * 0.002 + 200 * 0.001)
    assert Computing(0.1, 0.002).wait_s(300) == pytest.approx(0.1 + 300 * 0.002), "no pace was measured"


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert Computing().wait_s(0) is None
    assert Computing(step_s=0.1).wait_s(0) == pytest.approx(0.1)
    assert Computing(step_s=0.1).wait_s(5) is None
    assert Restoring().needs_s(3) is None
    assert Restoring().needs_s(0) == 0.0
    assert repair_s(5, 3, COMPUTING, Restoring()) is None
    assert computed_again({1: 3}, BLOCK, Computing(), RESTORING) == set()
    assert computed_again({1: 3}, BLOCK, COMPUTING, Restoring()) == set()


def test_blocks_are_restored_before_the_tail_is_computed() -> None:
    assert repair_s(10, 20, COMPUTING, RESTORING) == pytest.approx(0.05 + 20 * 0.004 + 0.1 + 10 * 0.002)


def test_a_short_request_is_computed_again_and_a_long_one_restored() -> None:
    slow = Restoring(wait_s=0.08, block_s=0.004)
    assert computed_again({1: 1}, BLOCK, COMPUTING, slow) == {1}  # 32 ms against 84
    assert computed_again({1: 1}, BLOCK, COMPUTING, RESTORING) == set(), (
        "32 ms against 54: that is no certain gain"
    )
    assert computed_again({1: 100}, BLOCK, COMPUTING, RESTORING) == set()
    assert computed_again({1: 100, 2: 1, 3: 0}, BLOCK, COMPUTING, RESTORING) == {2}


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(0, 20), st.integers(0, 300), max_size=12),
    st.floats(0.0001, 0.01), st.floats(0.0001, 0.05), st.floats(0.0, 1.0),
)  # fmt: skip
def test_who_is_computed_again_never_waits_longer_for_it(
    lacking: dict[int, int], token_s: float, block_s: float, wait_s: float
) -> None:
    computing, restoring = Computing(0.1, token_s), Restoring(wait_s, block_s)
    chosen = computed_again(lacking, BLOCK, computing, restoring)
    if not chosen:
        return
    again = sum(lacking[rid] for rid in chosen) * BLOCK
    rest = sum(blocks for rid, blocks in lacking.items() if rid not in chosen)
    longest = max(lacking[rid] for rid in chosen)
    computed_s, restored_s = computing.wait_s(again), restoring.needs_s(rest + longest)
    assert computed_s is not None
    assert restored_s is not None
    assert computed_s - computing.step_s < PREFERRED_SHARE * restored_s
    assert longest <= min((b for rid, b in lacking.items() if b and rid not in chosen), default=longest)
