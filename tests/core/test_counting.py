"""What is counted is what the body does, whatever ran in this process before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from tests.core.counting import calls, lines


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """It comes at nearly every object, and tells somebody, as it does after a test of Hypothesis."""
    thresholds = gc.get_threshold()

    def told(_phase: str, _info: dict[str, int]) -> None:
        sum([1])

    gc.callbacks.append(told)
    gc.set_threshold(1)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(told)


def body() -> None:
    for _ in range(100):
        _ = [[]]


@pytest.mark.usefixtures("eager_collector")
@pytest.mark.parametrize("count", [calls, lines])
def test_the_collector_is_not_counted(count: Callable[[Callable[[], object]], int]) -> None:
    counted = count(body)
    gc.set_threshold(100_000)
    assert counted == count(body)
    assert gc.isenabled()
