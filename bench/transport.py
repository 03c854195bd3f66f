"""Links between two processes: ours over each transport, and sealed over TCP, beside ucx_perftest, ucxx and asyncio.

Messages of 1 KB go there and back; messages of 64 KB and 4 MB go one way with 8 MB of them unacknowledged. CPU time is
that of both processes for one message. An idle node has links to and from 8 others, with a ping each 200 ms.
ucx_perftest spins, does nothing with what it receives, and is what libucp itself can do.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contract import Result, progress
from bench.transport_peers import OURS, Absent, Side, idle_share, side

SIZES = {"1k": 1 << 10, "64k": 64 << 10, "4m": 4 << 20}
IDLE_LINKS = 8
ROUND_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """How long one measurement is."""

    rounds: int
    round_trips: int
    bytes_one_way: int
    idle_s: float


QUICK = Load(rounds=8, round_trips=1500, bytes_one_way=128 << 20, idle_s=2.0)
FULL = Load(rounds=12, round_trips=5000, bytes_one_way=512 << 20, idle_s=5.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds, bytes/s, and CPU seconds of both sides for each message, by size."""

    latency_1k_s: float
    bandwidth: dict[str, float]
    cpu_s: dict[str, float]


async def latency_and_cpu(link: Side, load: Load) -> tuple[float, float]:
    """Seconds of a round trip of 1 KB, and CPU seconds for each of its messages; warmed up."""
    await link.round_trips(SIZES["1k"], load.round_trips // 10)
    before = await link.cpu_s()
    started = time.perf_counter()
    await link.round_trips(SIZES["1k"], load.round_trips)
    seconds = (time.perf_counter() - started) / load.round_trips
    return seconds, (await link.cpu_s() - before) / (2 * load.round_trips)


async def bandwidth_and_cpu(link: Side, name: str, load: Load) -> tuple[float, float]:
    """Bytes/s one way in messages of one size, and CPU seconds for each; warmed up."""
    count = load.bytes_one_way // SIZES[name]
    await link.one_way(SIZES[name], count // 8)
    before = await link.cpu_s()
    started = time.perf_counter()
    sent = await link.one_way(SIZES[name], count)
    seconds = time.perf_counter() - started
    return sent * SIZES[name] / seconds, (await link.cpu_s() - before) / sent


async def measure_round(links: dict[str, Side], load: Load) -> dict[str, Sample]:
    """One round of all links in the order given; all are measured at one size before the next begins."""
    latency: dict[str, float] = {}
    bandwidth: dict[str, dict[str, float]] = {name: {} for name in links}
    cpu: dict[str, dict[str, float]] = {name: {} for name in links}
    for name, link in links.items():
        async with asyncio.timeout(ROUND_S_MAX):
            latency[name], cpu[name]["1k"] = await latency_and_cpu(link, load)
    for size in ("64k", "4m"):
        for name, link in links.items():
            async with asyncio.timeout(ROUND_S_MAX):
                bandwidth[name][size], cpu[name][size] = await bandwidth_and_cpu(link, size, load)
    return {name: Sample(latency[name], bandwidth[name], cpu[name]) for name in links}


def rotated(links: dict[str, Side], number: int) -> dict[str, Side]:
    """Another one begins in each round: whoever follows ucx_perftest, which spins, finds processors awake
    and has up to a third less latency."""
    names = [*links][number % len(links) :] + [*links][: number % len(links)]
    return {name: links[name] for name in names}


def perftest_command() -> tuple[list[str], dict[str, str]]:
    """ucx_perftest of the libucx package, and its environment: TCP on loopback. Raises Absent."""
    spec = importlib.util.find_spec("libucx")
    home = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    binary = home / "bin" / "ucx_perftest"
    if not os.access(binary, os.X_OK):
        raise Absent("the libucx package has no ucx_perftest")
    settings = {"LD_LIBRARY_PATH": str(home / "lib"), "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    return [str(binary)], {**os.environ, **settings}


def perftest(test: str, size: int, count: int) -> list[float]:
    """The figures of one run: iterations; latency in us, typical, average, overall; bandwidth in MB/s and
    messages/s, average and overall. Raises Absent."""
    command, environment = perftest_command()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    options = ["-t", test, "-s", str(size), "-n", str(count), "-w", str(max(4, count // 8)), "-f"]
    with subprocess.Popen([*command, "-p", port], env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):  # it cannot tell when it listens
                client = subprocess.run(
                    [*command, "127.0.0.1", "-p", port, *options],
                    env=environment, capture_output=True, text=True, timeout=ROUND_S_MAX, check=False,
                )  # fmt: skip
                if client.returncode == 0 or server.poll() is not None:
                    break
                time.sleep(0.02)
            fields = client.stdout.split("\n")[-2].split() if client.returncode == 0 else []
            if len(fields) != 8:
                raise Absent(f"ucx_perftest {test}: {(client.stderr or client.stdout)[-200:]}")
        finally:
            server.kill()
    return [float(field) for field in fields]


def perftest_sample(load: Load) -> Sample:
    one_way_s = perftest("ucp_am_lat", SIZES["1k"], 2 * load.round_trips)[3] * 1e-6
    bandwidth = {
        name: perftest("ucp_am_bw", SIZES[name], load.bytes_one_way // SIZES[name])[5] * (1 << 20)
        for name in ("64k", "4m")
    }
    return Sample(2 * one_way_s, bandwidth, {})


async def compare(
    names: Sequence[str], load: Load, absent: dict[str, str], *, with_perftest: bool = False
) -> dict[str, list[Sample]]:
    """Alternating rounds over links that stay open, each to a process of its own."""
    found: dict[str, list[Sample]] = {}
    async with contextlib.AsyncExitStack() as stack:
        links: dict[str, Side] = {}
        for name in names:
            try:
                links[name] = await stack.enter_async_context(side(name))
            except Absent as error:
                absent[name] = str(error)
        for number in range(load.rounds if links else 0):
            for name, sample in (await measure_round(rotated(links, number), load)).items():
                note(found, name, sample, number)
            if not with_perftest or "ucx_perftest" in absent:
                continue
            try:
                note(found, "ucx_perftest", await asyncio.to_thread(perftest_sample, load), number)
            except Absent as error:
                absent["ucx_perftest"] = str(error)
    return {name: samples for name, samples in found.items() if name not in absent}


def note(found: dict[str, list[Sample]], name: str, sample: Sample, number: int) -> None:
    found.setdefault(name, []).append(sample)
    cpu = "  ".join(f"{seconds * 1e6:.0f}/{size}" for size, seconds in sample.cpu_s.items())
    progress(
        f"round {number + 1}: {name:<13}{sample.latency_1k_s * 1e6:8.1f} us"
        f"{sample.bandwidth['64k'] / 1e9:7.2f} GB/s{sample.bandwidth['4m'] / 1e9:7.2f} GB/s"
        + (f"   CPU us {cpu}" if cpu else "")
    )


def record(result: Result, name: str, samples: list[Sample]) -> None:
    """Over UCX the names are those of the bench contract; the others carry their own."""
    prefix, into = ("" if name == "ucx" else f"{name}_"), ("metrics" if name in OURS else "baseline")
    result.measure(f"{prefix}latency_1k_s", [s.latency_1k_s for s in samples], into)
    for size in ("64k", "4m"):
        result.measure(f"{prefix}bandwidth_{size}", [s.bandwidth[size] for s in samples], into)
    for size in samples[0].cpu_s:
        result.measure(f"{prefix}cpu_s_{size}", [s.cpu_s[size] for s in samples], into)


def ratios(result: Result, found: dict[str, list[Sample]]) -> None:
    """Ours over UCX against ucx_perftest, `auto` against everything else."""

    def compare_by(metric: str, pick: Callable[[Sample], float], better: Callable[..., float]) -> None:
        typical = {name: statistics.median(map(pick, samples)) for name, samples in found.items()}
        pairs = {
            "ucx": ("ucx", "ucx_perftest"),
            "auto_asyncio": ("auto", "asyncio"),
            "sealed_sockets": ("sealed", "sockets"),
            "auto_ucxx": ("auto", "ucxx"),
        }
        typical["best"] = better(typical["ucx"], typical["sockets"])
        pairs["auto_best"] = ("auto", "best")
        for name, (ours, theirs) in pairs.items():
            if theirs in typical:
                times = typical[ours] / typical[theirs]
                result.ratios[f"{metric}_{name}"] = times if better is max else 1 / times

    for size in ("64k", "4m"):
        compare_by(f"bandwidth_{size}", lambda sample, size=size: sample.bandwidth[size], max)  # type: ignore[misc]
    compare_by("latency_1k", lambda sample: sample.latency_1k_s, min)


def run(*, quick: bool) -> Result:
    load = QUICK if quick else FULL
    result = Result("transport", settings={"idle_links": IDLE_LINKS, "rounds": load.rounds, "sizes": SIZES})
    found = asyncio.run(compare((*OURS, "asyncio"), load, result.absent, with_perftest=True))
    for name in OURS:
        share = asyncio.run(idle_share(name, IDLE_LINKS, load.idle_s))
        progress(f"idle over {name}: {100 * share:.2f} % of a core")
        result.metrics["idle_cpu_share" if name == "ucx" else f"{name}_idle_cpu_share"] = share
    # Last and alone: its thread goes on polling, which the others would pay for.
    found |= asyncio.run(compare(("ucxx",), load, result.absent))
    for system, samples in found.items():
        record(result, system, samples)
    ratios(result, found)
    return result
