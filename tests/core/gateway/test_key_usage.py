"""Allowances of API keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.contract.api_keys import KeyLimits
from web.gateway.errors import ApiError
from web.gateway.key_usage import KeyUsage


def refused(usage: KeyUsage, now: float) -> float:
    """Seconds to wait; 0: it was let in."""
    try:
        usage.begin(now)
    except ApiError as error:
        return error.retry_after_s if error.status == 429 else -1.0
    return 0.0


def test_a_minute_s_requests_come_back_evenly() -> None:
    usage = KeyUsage("a", KeyLimits(requests_per_minute=6))
    assert [refused(usage, 100.0) for _ in range(6)] == [0.0] * 6
    assert refused(usage, 100.0) == pytest.approx(10.0)
    assert refused(usage, 104.0) == pytest.approx(6.0)
    assert refused(usage, 110.0) == 0.0
    assert refused(usage, 110.0) == pytest.approx(10.0)
    assert (usage.requests, usage.refused) == (7, 3)
    assert [refused(usage, 1e6) for _ in range(7)] == [0.0] * 6 + [pytest.approx(10.0)], (
        "not more than a minute's"
    )


def test_tokens_may_be_overdrawn_by_what_is_under_way() -> None:
    usage = KeyUsage("a", KeyLimits(tokens_per_minute=60))
    usage.begin(0.0)
    usage.charge(50, 0)
    assert refused(usage, 0.0) == 0.0
    usage.charge(0, 100)
    assert refused(usage, 0.0) == pytest.approx(91.0)
    assert refused(usage, 90.0) == pytest.approx(1.0)
    assert refused(usage, 91.5) == 0.0


def test_what_is_refused_has_not_come() -> None:
    usage = KeyUsage("a", KeyLimits(streams=2, requests_per_minute=100))
    usage.begin(0.0)
    usage.begin(0.0)
    assert refused(usage, 0.0) > 0
    usage.end()
    assert (usage.running, refused(usage, 0.0)) == (1, 0.0)


def test_no_limits_let_everything_in() -> None:
    usage = KeyUsage("a", KeyLimits())
    for _ in range(1000):
        usage.begin(0.0)
        usage.charge(10**6, 10**6)
    assert (usage.running, usage.refused) == (1000, 0)


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), max_size=60),
)
def test_in_the_long_run_nobody_gets_more_than_the_rate(rate: int, steps: list[tuple[float, int]]) -> None:
    usage, now, let_in = KeyUsage("a", KeyLimits(requests_per_minute=rate)), 0.0, 0
    for pause_s, asked in steps:
        now += pause_s
        let_in += sum(refused(usage, now) == 0.0 for _ in range(asked))
    assert let_in <= rate + now * rate / 60 + 1e-6
