"""One cluster for all modules that bring none of their own: starting one takes seconds. Tests leave it whole."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Iterator

import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from tests.e2e.cluster import Cluster
from tests.e2e.outage import OUTAGE, Outage

MEANWHILE = ("parity", "sim")


class Held:
    """The shared cluster, from its first test to its last one: idle processes would be in the others' way."""

    def __init__(self) -> None:
        self._running: Cluster | None = None

    def cluster(self) -> Cluster:
        if self._running is None:
            running = Cluster(controllers=2)
            running.__enter__()
            self._running = running
        return self._running

    def clear(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.__exit__(None, None, None)


held = Held()


def shares(item: pytest.Item | None) -> bool:
    """Whether it runs on the shared cluster. A module's own fixture takes precedence over ours."""
    if not isinstance(item, pytest.Function) or "cluster" not in item.fixturenames:
        return False
    return item.path.parent.name == "e2e" and not hasattr(item.module, "cluster")


class Beside:
    """Begins the outage before tests that compute and judge nothing by the clock. Ends it with the session, which may
    have been cut short."""

    def __init__(self, first: pytest.Item) -> None:
        self._first = first

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item is self._first:
            OUTAGE.begin()

    def pytest_sessionfinish(self) -> None:
        OUTAGE.close()


def waits_beside(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Who waits for the outage's end comes behind what can be done meanwhile."""
    waits = [item for item in items if "outage" in getattr(item, "fixturenames", ())]
    meanwhile = [item for item in items if item.path.parent.name in MEANWHILE]
    if waits and etcd_problem() is None:
        config.pluginmanager.register(Beside((meanwhile or waits)[0]))
        if meanwhile:
            items[:] = [item for item in items if item not in waits]
            behind = items.index(meanwhile[-1]) + 1
            items[behind:behind] = waits


@pytest.hookimpl(trylast=True)  # of what is left to run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that share the cluster one after another, at the place of the first of them."""
    waits_beside(config, items)
    places = [place for place, item in enumerate(items) if shares(item)]
    if places:
        together = [items[place] for place in places]
        before = items[: places[0]]
        items[:] = before + together + [item for item in items[places[0] :] if not shares(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if shares(item) and not shares(nextitem):
            held.clear()


def pytest_sessionfinish() -> None:
    held.clear()  # the session may have been cut short


def etcd_problem() -> str | None:
    """Why there is no etcd to run; None: there is."""
    try:
        find_etcd_binary(os.environ)
    except EtcdBinaryError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def etcd_binary() -> None:
    """Skips with the reason when there is no etcd to run."""
    if problem := etcd_problem():
        pytest.skip(problem)


@pytest.fixture
def outage(etcd_binary: None) -> Outage:
    return OUTAGE


@pytest.fixture
def cluster(etcd_binary: None) -> Cluster:
    """Two instances of four stages, two controllers, one gateway, the demo model, mode replicate."""
    return held.cluster()


@pytest.fixture
def home(cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster with every node at home, before and after the test."""
    try:
        asyncio.run(cluster.wait_all_home())
        yield cluster
        for name in [f"n{number}" for number in range(8)] + ["c1", "c2", "g1", "etcd0", "launcher"]:
            cluster.local.release(name)
        asyncio.run(cluster.wait_all_home(60.0))
    except BaseException:
        held.clear()  # what one test broke is nothing for the next one
        raise
