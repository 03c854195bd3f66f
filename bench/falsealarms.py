"""Full load and no fault at all: every verdict against a node is a false alarm."""

from __future__ import annotations

import asyncio
import itertools
import time

from bench.cluster import generator, running
from bench.contract import Result, progress
from controlplane.contract.events import EventKind
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from controlplane.kfadmin.local import LocalCluster

OPTIONS = ("minutes",)
STREAMS = 32  # always open: a new request for each that ends
POLL_S = 0.25
ALARMS = {
    EventKind.SUSPECTED: "suspected",
    EventKind.DIED: "died",
    EventKind.UNAVAILABLE: "unavailable",
    EventKind.EPOCH: "epochs",
}


def run(quick: bool, minutes: float | None = None) -> Result:
    minutes = minutes or (4.0 if quick else 60.0)
    result = Result("falsealarms", settings={"streams": STREAMS, "minutes": minutes, "quick": quick})
    with running(Mode.REPLICATE) as cluster:
        with cluster.admin() as admin:
            before = max((row.id for row in admin.events(limit=1)), default=0)
        started = time.monotonic()
        served, slowest = asyncio.run(_load(cluster, started + 60.0 * minutes))
        hours = (time.monotonic() - started) / 3600.0
        counts = dict.fromkeys(ALARMS.values(), 0)
        with cluster.admin() as admin:
            for row in admin.events(limit=1000, after=before):
                if row.event.kind in ALARMS:
                    counts[ALARMS[row.event.kind]] += 1
                    progress(f"  {row.event.kind.value}: {row.event.message}")
    result.metrics["hours"] = hours
    result.metrics["requests"] = len(served)
    result.metrics["requests_failed"] = sum(bool(stream.error) for stream in served)
    result.metrics["tokens_per_s"] = sum(len(stream.tokens) for stream in served) / (hours * 3600.0)
    result.metrics["slowness_max"] = slowest
    for name, count in counts.items():
        result.metrics[name] = count
    verdicts = counts["suspected"] + counts["died"]
    result.metrics["false_alarms"] = verdicts
    result.metrics["false_alarms_per_hour"] = verdicts / hours
    return result


async def _load(cluster: LocalCluster, end: float) -> tuple[list[Stream], float]:
    """Keep STREAMS streams open until `end` (monotonic). Returns them, and the greatest slowness of any node."""
    served: list[Stream] = []
    prompts = _prompts()
    async with generator(cluster).client() as client, asyncio.TaskGroup() as group:

        async def one_after_another() -> None:
            while time.monotonic() < end:
                served.append(await generator(cluster).stream(client, next(prompts)))

        for _ in range(STREAMS):
            group.create_task(one_after_another())
        slowest = await _watch(cluster, end, served)
    return served, slowest


async def _watch(cluster: LocalCluster, end: float, served: list[Stream]) -> float:
    slowest, told = 0.0, time.monotonic()
    with cluster.admin() as admin:
        while time.monotonic() < end:
            status = await asyncio.to_thread(admin.status)
            slowest = max(slowest, *(node.slowness for node in status.nodes))
            if time.monotonic() - told >= 30.0:
                told = time.monotonic()
                states = " ".join(f"{node.node}:{node.state.value}" for node in status.nodes)
                progress(
                    f"  {len(served)} requests, {end - told:.0f} s left, slowness {slowest:.2f} at most; {states}"
                )
            await asyncio.sleep(POLL_S)
    return slowest


def _prompts() -> itertools.chain[Prompt]:
    """Short and long prompts, short and long answers, without end: decodes beside chunks of prefill."""
    return itertools.chain.from_iterable(
        sample_prompts(1, 16 + 37 * (number % 7), first_seed=number, words=300 if number % 5 == 0 else 0)
        for number in itertools.count()
    )
