"""Which GPU of a host each of its nodes has."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.contract.errors import ConfigError

COUNT_LIMIT_S = 60.0


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


def assign(nodes: Sequence[str], devices: int) -> dict[str, Place]:
    """A device for each of a host's nodes, in their order, one after the other; where there are more nodes than
    devices, some share one. Raises ConfigError if there is none."""
    if devices < 1:
        raise ConfigError("engine.device is 'cuda', and torch sees no CUDA device on this host")
    on = {node: number % devices for number, node in enumerate(nodes)}
    together = Counter(on.values())
    return {node: Place(f"cuda:{at}", 1.0 / together[at], devices) for node, at in on.items()}
