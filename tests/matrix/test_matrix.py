"""Faults on real processes, each on a host of its own: `make matrix` plays every cell, `make test` a few of them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from controlplane.kfadmin.loadgen import Prompt, Stream
from tests.matrix import record
from tests.matrix.cells import CELLS, Cell, Shape
from tests.matrix.hosts import HostCluster
from tests.matrix.namespaces import Network, why_not
from tests.matrix.play import Player
from tests.matrix.streams import Result, judge
from tests.matrix.table import page

RECORD = os.environ.get("KF_MATRIX_RESULTS", "")  # of `python -m tests.matrix`, which plays every cell
UNTIL = float(os.environ.get("KF_MATRIX_UNTIL", "inf"))  # monotonic; no cell begins later
PLAYED = record.missing(record.results(Path(RECORD))) if RECORD else [cell for cell in CELLS if cell.quick]


class Stage:
    """A cluster for as many cells of one shape as leave it whole."""

    def __init__(self) -> None:
        self._cluster: HostCluster | None = None
        self._player: Player | None = None
        self._shape = Shape.FOUR

    def player(self, shape: Shape) -> Player:
        if shape is not self._shape or (self._player is not None and self._player.is_worn):
            self.clear()
        self._shape = shape
        if self._player is None:
            self._cluster = HostCluster(shape)
            self._cluster.__enter__()
            self._player = Player(self._cluster)
        return self._player

    def logs(self) -> str:
        return self._cluster.logs() if self._cluster is not None else ""

    def clear(self) -> None:
        cluster, self._cluster, self._player = self._cluster, None, None
        if cluster is not None:
            cluster.__exit__(None, None, None)


@pytest.fixture(scope="module")
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


def test_a_record_goes_on_where_it_ended_and_with_the_same_code_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, (first, second, third) = tmp_path / "record", CELLS[:3]
    monkeypatch.setattr(record, "played_digest", lambda: "one")
    record.begin(file)
    for cell, problems in ((first, []), (second, ["slow"]), (second, []), (third, ["slow"])):
        record.add(file, Result(cell.name, problems=list(problems)))
    record.begin(file)
    found = record.results(file)
    assert [(result.cell, result.problems) for result in found] == [
        (first.name, []), (second.name, ["slow"]), (second.name, []), (third.name, ["slow"]),
    ]  # fmt: skip
    assert record.missing(found) == list(CELLS[2:])
    text = page(found)
    assert f"{len(CELLS)} cells, 3 played, 2 passed" in text
    assert f"- {second.name}: slow\n- {third.name}: slow" in text, "an earlier failure is told of"
    monkeypatch.setattr(record, "played_digest", lambda: "another")
    record.begin(file)
    assert record.missing(record.results(file)) == list(CELLS)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not a record of the matrix"):
        record.begin(file)


def test_the_digest_is_of_what_is_played_and_not_of_what_reads_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[set[str]] = []

    def digest(modules: Iterable[Path]) -> str:
        taken.append({str(path.relative_to(record.ROOT)) for path in modules})
        return ""

    monkeypatch.setattr(record, "code_digest", digest)
    record.played_digest()
    played = {"dataplane/node.py", "dataplane/_fast/ucp.pyx", "tests/matrix/cells.py", "tests/e2e/faults.py"}
    assert played <= taken[0]
    assert not taken[0] & {"tests/matrix/table.py", "tests/matrix/record.py", "tests/matrix/__main__.py"}


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
    if time.monotonic() > UNTIL:
        pytest.skip("later: the time is up")
    result = Result(cell.name, problems=["it was not played to its end"])
    try:
        result = stage.player(cell.shape).play(cell)
        assert not result.problems, "\n".join([*result.problems, stage.logs()])
    except BaseException:  # Ctrl-C as well: the next cell begins with a fresh cluster
        stage.clear()
        raise
    finally:
        if RECORD:
            record.add(Path(RECORD), result)
