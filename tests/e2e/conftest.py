"""One cluster a test module: starting one takes seconds. Tests leave it whole (see `home`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from tests.e2e.cluster import Cluster


@pytest.fixture(scope="session")
def etcd_binary() -> None:
    """Skips with the reason when there is no etcd to run."""
    try:
        find_etcd_binary(os.environ)
    except EtcdBinaryError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster(etcd_binary: None) -> Iterator[Cluster]:
    """Two instances of four stages, two controllers, one gateway, the demo model, mode replicate."""
    with Cluster() as running:
        yield running


@pytest.fixture
def home(cluster: Cluster) -> Iterator[Cluster]:
    """The module's cluster with every node at home, before and after the test."""
    asyncio.run(cluster.wait_all_home())
    yield cluster
    for name in [f"n{number}" for number in range(8)] + ["c1", "c2", "g1", "etcd0", "launcher"]:
        cluster.local.release(name)
    asyncio.run(cluster.wait_all_home(60.0))
