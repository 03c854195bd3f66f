"""The simulator's seeds are played on the core that other tests leave idle."""

from __future__ import annotations

import pytest

from tests.sim.beside import PIECES

# One process computes in them, and nothing is judged by the clock.
BESIDE = (
    "tests/core/",
    "tests/gpu/",
    "tests/parity/",
    "tests/e2e/test_versions.py",
    "tests/sim/test_seeds.py",
)


class Beside:
    """Lets the seeds run beside such tests only."""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        PIECES.may_run(item.nodeid.startswith(BESIDE))

    def pytest_sessionfinish(self) -> None:
        PIECES.close()


@pytest.hookimpl(trylast=True)  # of what is left to run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seeds = [
        item for item in items if isinstance(item, pytest.Function) and item.originalname == "test_seeds"
    ]
    if seeds:
        PIECES.begin([item.callspec.params["first"] for item in seeds])
        config.pluginmanager.register(Beside())
