"""Which GPU a node of a host has."""

from __future__ import annotations

import pytest

from controlplane.contract.errors import ConfigError
from dataplane.accelerators import Place, assign, count_devices


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


def test_they_are_counted_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_devices() == 0
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(ConfigError, match="cannot be counted"):
        count_devices()
