"""Which GPU of a host each of its nodes has."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec

from controlplane.contract.errors import ConfigError
from controlplane.contract.files import replace_file
from controlplane.unreadable import UNREADABLE

COUNT_LIMIT_S = 60.0
PLACED_FILE = "nodes-placed.json"  # in the run directory: node -> Place
ROOM_NONE = 1e-6  # of a device: what sums of shares leave of it by rounding
EMPTY: Mapping[str, Place] = MappingProxyType({})


class AllTaken(OSError):
    """No device of this host has room for one more node. Trying later may help."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node computes. share: of the device, when several nodes have it. devices: of its host, 0 for CPUs."""

    device: str = "cpu"
    share: float = 1.0
    devices: int = 0


CPU = Place()


def count_devices() -> int:
    """CUDA devices that a process started now may use. By a process of its own: to ask CUDA makes a process one that
    cannot be forked any more. Raises ConfigError when there is no telling."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COUNT_LIMIT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or error
        raise ConfigError(f"the CUDA devices of this host cannot be counted: {why}") from error


def assign(nodes: Iterable[str], devices: int, taken: Mapping[str, Place] = EMPTY) -> dict[str, Place]:
    """A device for each of a host's nodes, one after the other where its share is largest; where there are more nodes
    than devices, some share one. `taken`: the places of those that stay where they are. A node for which they leave
    nothing is not in the result. Raises ConfigError if there is no device."""
    if devices < 1:
        raise ConfigError("engine.device is 'cuda', and torch sees no CUDA device on this host")
    room = [1.0] * devices
    for place in taken.values():
        if (at := _number(place)) < devices:
            room[at] -= place.share
    on: dict[str, int] = {}
    together: Counter[int] = Counter()
    for node in nodes:
        at = max(range(devices), key=lambda at: room[at] / (together[at] + 1))
        if room[at] > ROOM_NONE:
            on[node] = at
            together[at] += 1
    return {node: Place(f"cuda:{at}", room[at] / together[at], devices) for node, at in on.items()}


class Places:
    """Where the nodes of a host compute. A node has its place until it is let go, whichever launcher asks: its process
    has memory there, and others of the host have what it leaves.

    In RUN_DIR/nodes-placed.json for the next launcher, to which the nodes are left."""

    def __init__(self, run_dir: Path, devices: int) -> None:
        """Raises ConfigError if there is no device."""
        assign((), devices)
        self._devices = devices
        self._file = run_dir / PLACED_FILE
        self._places: dict[str, Place] = {}

    def recall(self, nodes: Collection[str], running: Collection[str]) -> None:
        """From the launcher before: places of `nodes`, which are to run, and of those that do. None if none runs:
        nothing is taken then, and all can be put anew, together. Raises OSError, ValueError for a file that is none."""
        try:
            before = msgspec.json.decode(self._file.read_bytes(), type=dict[str, Place])
        except FileNotFoundError:
            return
        except UNREADABLE as error:
            raise ValueError(str(error)) from error
        there = {node for node, place in before.items() if _number(place) < self._devices and node in nodes}
        if before.keys() & set(running):
            there.update(running)
            self._places = {
                node: replace(place, devices=self._devices) for node, place in before.items() if node in there
            }

    def add(self, nodes: Iterable[str]) -> dict[str, Place]:
        """Places of those that have none yet, as far as there is room: as if they had come together. Raises OSError if
        the next launcher will not find them."""
        fresh = assign([node for node in nodes if node not in self._places], self._devices, self._places)
        self._places |= fresh
        if fresh:
            self._write()
        return fresh

    def of(self, node: str) -> Place:
        """Raises AllTaken."""
        if node not in self._places:
            have = ", ".join(
                f"{name} {place.share:.2f} of {place.device}" for name, place in self._places.items()
            )
            raise AllTaken(
                f"the nodes of this host leave nothing of its {self._devices} GPUs to another one ({have}): start all"
                " of them afresh, so that they share, or run fewer instances here"
            )
        return self._places[node]

    def remove(self, node: str) -> None:
        """It has ended, and is not to come back. Raises OSError as `add` does."""
        if self._places.pop(node, None) is not None:
            self._write()

    def _write(self) -> None:
        replace_file(self._file, msgspec.json.encode(self._places))


def _number(place: Place) -> int:
    return int(place.device.removeprefix("cuda:"))
