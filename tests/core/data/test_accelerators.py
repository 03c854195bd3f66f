"""Which GPU a node of a host has."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.contract.errors import ConfigError
from dataplane.accelerators import PLACED_FILE, AllTaken, Place, Places, assign, count_devices


def test_one_device_a_node() -> None:
    assert assign(["n4", "n5", "n6"], 8) == {
        "n4": Place("cuda:0", 1.0, 8),
        "n5": Place("cuda:1", 1.0, 8),
        "n6": Place("cuda:2", 1.0, 8),
    }


def test_more_nodes_than_devices_share_them() -> None:
    places = assign([f"n{i}" for i in range(5)], 2)
    assert [(p.device, p.share) for p in places.values()] == [
        ("cuda:0", 1 / 3), ("cuda:1", 1 / 2), ("cuda:0", 1 / 3), ("cuda:1", 1 / 2), ("cuda:0", 1 / 3),
    ]  # fmt: skip


def test_no_device_is_said() -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device on this host"):
        assign(["n0"], 0)


def test_who_comes_later_gets_what_those_leave_that_stay() -> None:
    """By place in the list n1 would have been put beside n2."""
    first = assign(["n0", "n1", "n2"], 3)
    stay = {node: first[node] for node in ("n0", "n2")}
    assert assign(["n1"], 3, stay) == {"n1": Place("cuda:1", 1.0, 3)}
    assert assign(["n1", "n4", "n3"], 3, stay) == {
        node: Place("cuda:1", 1 / 3, 3) for node in ("n1", "n3", "n4")
    }
    assert assign(["n3"], 3, first) == {}, "nothing is left"
    halves = assign([f"n{i}" for i in range(4)], 2)
    del halves["n2"]
    assert assign(["n4", "n5"], 2, halves) == {node: Place("cuda:0", 0.25, 2) for node in ("n4", "n5")}
    assert assign(["n1"], 1, {"n0": Place("cuda:1", 1.0, 2)}) == {"n1": Place("cuda:0", 1.0, 1)}


def test_places_are_kept_until_they_are_let_go(tmp_path: Path) -> None:
    places = Places(tmp_path, 3)
    places.recall(["n0", "n1", "n2"], [])  # the first launcher
    assert {node: place.device for node, place in places.add(["n0", "n1", "n2"]).items()} == {
        "n0": "cuda:0", "n1": "cuda:1", "n2": "cuda:2",
    }  # fmt: skip
    assert places.add(["n0", "n1", "n2"]) == {}
    with pytest.raises(AllTaken, match=r"nothing of its 3 GPUs .*n1 1.00 of cuda:1"):
        places.of("n3")
    places.remove("n1")

    after = Places(tmp_path, 3)
    after.recall(["n0", "n4", "n1"], ["n2"])  # n0 is down for an instant, n2 is to end
    assert after.add(["n0", "n4", "n1"]) == {node: Place("cuda:1", 0.5, 3) for node in ("n4", "n1")}
    assert after.of("n0") == Place("cuda:0", 1.0, 3)
    after.remove("n2")
    assert after.add(["n3"]) == {"n3": Place("cuda:2", 1.0, 3)}

    fresh = Places(tmp_path, 3)
    fresh.recall(["n0", "n1", "n2", "n3"], [])  # nothing runs: whoever is there shares alike
    assert [(p.device, p.share) for p in fresh.add(["n0", "n1", "n2", "n3"]).values()] == [
        ("cuda:0", 0.5), ("cuda:1", 1.0), ("cuda:2", 1.0), ("cuda:0", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "written", [b"{", b'{"n0":{"device":"\xff"}}', b'{"n0":{"device":"tpu"}}', b'{"n0":{"x":' + b"[" * 9000]
)
def test_a_file_of_places_that_is_none_is_told(tmp_path: Path, written: bytes) -> None:
    (tmp_path / PLACED_FILE).write_bytes(written)
    places = Places(tmp_path, 2)
    with pytest.raises(ValueError, match=r"malformed|truncated|utf-8|recursion|invalid literal"):
        places.recall(["n0"], ["n0"])
    assert places.add(["n0"]) == {"n0": Place("cuda:0", 1.0, 2)}


def test_devices_that_are_gone_are_nobodys(tmp_path: Path) -> None:
    Places(tmp_path, 2).add(["n0", "n1"])
    places = Places(tmp_path, 1)
    places.recall(["n0", "n1"], ["n0"])
    assert places.of("n0") == Place("cuda:0", 1.0, 1)
    assert places.add(["n1"]) == {}


def test_they_are_counted_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_devices() == 0
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(ConfigError, match="cannot be counted"):
        count_devices()
