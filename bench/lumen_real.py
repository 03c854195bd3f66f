"""`bench lumen` on instances of real processes: one of them is killed under load, and is back after a while.

Real nodes, control plane, gateway and etcd; the devices are emulated (executor `oracle`), one node an instance. What is
compared differs in the mode only. Arrivals, lengths and the victim are the same in each.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time

from bench.cluster import running, wait_until
from bench.contract import progress
from bench.kevlarflow_check import compare
from bench.kevlarflow_load import OUTPUT_MEAN, VOCABULARY, Client, Outcome, Request, drive, workload
from controlplane.contract.config import EmulationConfig, EngineConfig, TimingConfig
from controlplane.contract.status import PipelineState
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster
from dataplane.devices import A10_LLAMA_8B_QUARTER

PLACES = 8  # requests of an instance in batches: two processors carry 1,500 tokens/s with all their processes
SHORTER = 4  # outputs are that much shorter than those of `bench kevlarflow`
LOAD = 0.8  # of the requests per second that all instances together bear
FAIL_AT_S, RELOAD_S = 8.0, 15.0
WINDOW_S, WINDOW_QUICK_S = 60.0, 30.0  # of arrivals
VICTIM = "n0"
UP = PipelineState.UP
GRACE_S = 1.0  # a fresh scheduler asks its stages what they hold of each request that comes within it


def measure(size: int, mode: Mode, quick: bool, seed: int) -> dict[str, float]:
    """One run of a cluster of `size` instances. Raises RuntimeError if it lost, doubled or changed a token."""
    requests = requests_of(size, WINDOW_QUICK_S if quick else WINDOW_S, seed)
    engine = EngineConfig(
        executor="oracle", pool_blocks=4096, max_batch_tokens=512, max_running=PLACES, max_waiting=20_000
    )
    timing = TimingConfig(
        # Who is only starved by this machine must not be taken for dead; the killed one is found by broken streams.
        reload_s=RELOAD_S, orphan_grace_s=GRACE_S, suspect_after_s=2.0, dead_after_s=5.0, unavailable_grace_s=60.0
    )  # fmt: skip
    emulation = EmulationConfig(profile="a10-llama-8b-quarter")
    with running(
        mode, instances=size, stages=1, engine=engine, timing=timing, emulation=emulation, controllers=1
    ) as cluster:
        time.sleep(GRACE_S)
        outcomes, killed, back, interrupted = asyncio.run(_load(cluster, requests))
    comparison = compare(outcomes, 1, VOCABULARY.stop)
    if comparison.lost or comparison.duplicated or comparison.different or comparison.failed:
        raise RuntimeError(f"{mode.value}, {size} instances: {comparison}")
    return _figures(outcomes, killed, interrupted) | {"away_s": back - killed}


def requests_of(size: int, seconds: float, seed: int) -> list[Request]:
    """As many as load `size` instances to LOAD."""
    step_s = A10_LLAMA_8B_QUARTER.step_s(PLACES, PLACES * 400)
    rate = LOAD * size * PLACES / (OUTPUT_MEAN / SHORTER * step_s)
    return [
        Request(each.at_s, each.prompt, max(2, each.max_tokens // SHORTER), each.seed)
        for each in workload(rate, seconds, seed)
    ]


async def _load(cluster: LocalCluster, requests: list[Request]) -> tuple[list[Outcome], float, float, int]:
    """Outcomes, when the victim was killed, when its instance served again, and how many requests it ran."""
    client = Client(cluster.gateway_url, cluster.api_key, cluster.config.model_name)
    started = time.monotonic() + 0.2
    load = asyncio.create_task(drive(client, requests, 1.0, started))
    await asyncio.sleep(started + FAIL_AT_S - time.monotonic())
    status = await asyncio.to_thread(cluster.status)
    held = cluster.config.mode is not Mode.STOP_RESTART  # there the launcher waits by itself
    if held:
        cluster.hold(VICTIM)
    killed = time.monotonic()
    cluster.kill(VICTIM)
    await asyncio.sleep(RELOAD_S)
    if held:
        cluster.release(VICTIM)
    await asyncio.to_thread(
        wait_until, cluster, "the instance serves again", lambda s: s.pipelines[0].state is UP
    )
    back = time.monotonic()
    return await load, killed, back, status.pipelines[0].running


def _figures(outcomes: list[Outcome], killed: float, interrupted: int) -> dict[str, float]:
    begun = [o for o in outcomes if o.times[0] <= killed < o.times[-1]]
    # Who was interrupted waited longest; the gateway knows who it was, and its clients do not.
    waits = sorted((_wait_s(o, killed) for o in begun), reverse=True)[: max(1, interrupted)]
    progress(
        f"    {len(outcomes)} requests, {interrupted} interrupted, waits {waits[-1]:.3f} to {waits[0]:.3f} s"
    )
    per_token = [(o.times[-1] - o.times[0]) / (len(o.times) - 1) for o in outcomes if len(o.times) > 1]
    return {
        "ttft_mean_s": statistics.fmean(o.ttft_s for o in outcomes),
        "tpot_mean_s": statistics.fmean(per_token),
        "recovery_mean_s": statistics.fmean(waits),
        "requests": len(outcomes),
        "interrupted": interrupted,
    }


def _wait_s(outcome: Outcome, killed: float) -> float:
    """The longest wait for a token after the kill."""
    gaps = (
        later - max(killed, earlier) for earlier, later in itertools.pairwise(outcome.times) if later > killed
    )
    return max(gaps, default=0.0)
