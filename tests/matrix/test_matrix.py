"""Faults on real processes, each on a host of its own: `make matrix` plays every cell, `make test` a few of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from controlplane.kfadmin.loadgen import Prompt, Stream
from tests.matrix.cells import CELLS, Cell
from tests.matrix.hosts import HostCluster
from tests.matrix.namespaces import Network, why_not
from tests.matrix.play import Player
from tests.matrix.streams import Result, judge

RESULTS = os.environ.get(
    "KF_MATRIX_RESULTS", ""
)  # a file that gets one line a cell; set: every cell is played
PLAYED = [cell for cell in CELLS if RESULTS or cell.quick]


class Stage:
    """A cluster for as many cells as leave it whole."""

    def __init__(self) -> None:
        self._cluster: HostCluster | None = None
        self._player: Player | None = None

    def player(self) -> Player:
        if self._player is None:
            self._cluster = HostCluster()
            self._cluster.__enter__()
            self._player = Player(self._cluster)
        return self._player

    def logs(self) -> str:
        return self._cluster.logs() if self._cluster is not None else ""

    def clear(self) -> None:
        cluster, self._cluster, self._player = self._cluster, None, None
        if cluster is not None:
            cluster.__exit__(None, None, None)


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    try:
        find_etcd_binary(os.environ)
    except EtcdBinaryError as error:
        pytest.skip(str(error))
    if reason := why_not():
        pytest.skip(reason)
    stage = Stage()
    try:
        yield stage
    finally:
        stage.clear()


def test_every_way_of_the_network_can_be_cut_delayed_and_lost() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Network(("a", "b")) as network:
        both = [("a", "b"), ("b", "a")]
        with network.inside("b"):
            server = socket.create_server((network.address("b"), 5000))

        def connects(within_s: float) -> bool:
            with network.inside("a"):
                try:
                    socket.create_connection((network.address("b"), 5000), timeout=within_s).close()
                except TimeoutError:
                    return False
            return True

        with server:
            assert connects(1.0)
            assert network.touched() == 0
            for way in both:
                network.cut([way])
                assert not connects(0.2)
                assert network.touched() > 0
            network.cut([])
            network.hold(both, delay_s=0.3)
            assert not connects(0.5)
            assert connects(2.0)
            network.hold(both, loss=1.0)
            assert not connects(0.2)
            network.hold([])
            assert connects(1.0)


def test_a_cell_sees_what_is_lost_doubled_different_or_failed() -> None:
    prompt = Prompt("Once", 1, 4)
    want = Stream(prompt, tokens=[1, 2, 3, 4], finish_reason="length")
    seen = {
        "lost": Stream(prompt, tokens=[1, 2, 3], finish_reason="length"),
        "duplicated": Stream(prompt, tokens=[1, 2, 3, 4, 4], finish_reason="length"),
        "different": Stream(prompt, tokens=[1, 2, 7, 4], finish_reason="length"),
        "": Stream(prompt, tokens=[1, 2, 3, 4], error="gone"),
    }
    for name, stream in seen.items():
        result = Result("x")
        judge(result, [stream], {prompt: want})
        assert result.problems
        assert [result.lost, result.duplicated, result.different] == [
            int(name == each) for each in ("lost", "duplicated", "different")
        ]
    result = Result("x")
    judge(result, [want], {prompt: want})
    assert (result.problems, result.tokens) == ([], 4)


@pytest.mark.parametrize("cell", PLAYED, ids=[cell.name for cell in PLAYED])
def test_cell(stage: Stage, cell: Cell) -> None:
    result = Result(cell.name, problems=["it was not played to its end"])
    try:
        result = stage.player().play(cell)
        assert not result.problems, "\n".join([*result.problems, stage.logs()])
    except BaseException:  # Ctrl-C as well: the next cell begins with a fresh cluster
        stage.clear()
        raise
    finally:
        if RESULTS:
            with Path(RESULTS).open("ab") as file:
                file.write(msgspec.json.encode(result) + b"\n")
