"""What is measured in real time, at time scale 1: the cost of replication while nothing fails, and recovery."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cluster import wait_settled
from bench.contract import Result, percentile, progress
from bench.kevlarflow_check import compare
from bench.kevlarflow_load import OUTPUT_MEAN, VOCABULARY, Client, Outcome, Request, drive, workload
from bench.kevlarflow_setup import MAX_RUNNING, STAGES, Scene, scene_cluster
from controlplane.contract.events import EventKind
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster

TPOT_S = 0.163
CPU_SHARE_PER_NODE = 0.017  # of one processor, at time scale 1, when idle
# Both clusters together leave the processors half of their time: where they filled them, what else ran was measured.
OVERHEAD_SCALE = {2: 1.5, 4: 0.75}  # by instances
OVERHEAD_RATE_MAX = 1.0  # requests per second and instance
OVERHEAD_TOKENS_MAX = 200  # the last streams would otherwise run for two minutes without company
OVERHEAD_WINDOW_S, OVERHEAD_WINDOW_QUICK_S = 240.0, 45.0  # emulated seconds of arrivals
# Recovery, at time scale 1: streams arrive evenly for some seconds, as gently as in operation, and all of them live
# until a good while after the kill: the node that comes back has its stage again then, at low load.
RAMP_S = 12.0
KILL_AT_S = 15.0
ALIVE_UNTIL_S = 27.0
WINDOW_S = 5.0  # a pause that ends later than this after a kill is not its doing


def measure_recovery(scene: Scene, rate: float, quick: bool, result: Result) -> None:
    """Fills in `rateN_recovery_*`, and `rateN_hand_back_*` for the pause when a node that has come back takes its stage
    again: with as many streams as `rate` keeps open."""
    key = f"rate{rate:g}_recovery"
    streams = round(min(MAX_RUNNING * scene.instances, rate * OUTPUT_MEAN * TPOT_S))
    # The scene's own victims, then the same at other stages: with a scheduler, too, which the paper leaves out.
    rounds = [_stages_on(scene, k) for k in range(1 if quick else STAGES)]
    with scene_cluster(scene, Mode.REPLICATE, 1.0) as cluster:
        _recovery(cluster, rounds, streams, result, key)
        if len(scene.victims) > 1 and not quick:
            # A node and the holder of its copy at once, which the scene has not: requests are computed again.
            together = [tuple(f"n{int(victim[1:]) // STAGES * STAGES}" for victim in scene.victims)]
            _recovery(cluster, together, streams, result, f"{key}_without_copy")


def _stages_on(scene: Scene, further: int) -> tuple[str, ...]:
    """Other victims in the same instances. Two of them are of different stages as in the scene: none holds the copy of
    another, whose requests would have to be computed again."""
    places = [divmod(int(victim[1:]), STAGES) for victim in scene.victims]
    return tuple(f"n{instance * STAGES + (stage + further) % STAGES}" for instance, stage in places)


def _streams(count: int, seed: int) -> list[Request]:
    """Arrivals over RAMP_S; each output is as long as it takes to be there when the kill has been got over."""
    drawn = workload(1.0, 1e9, seed, limit=count)
    starts = [RAMP_S * number / count for number in range(count)]
    return [
        replace(request, at_s=at_s, max_tokens=round((ALIVE_UNTIL_S - at_s) / TPOT_S))
        for request, at_s in zip(drawn, starts, strict=True)
    ]


def _client(cluster: LocalCluster) -> Client:
    return Client(cluster.gateway_url, cluster.api_key, cluster.config.model_name)


def measure_overhead(scene: Scene, rate: float, quick: bool, result: Result) -> float:
    """Fills in `rateN_overhead_*`: latency with copies against latency without, of the same requests on two clusters at
    the same time. Returns the processor seconds that a token takes on this machine, with all that serves it, beyond
    what nodes take when idle."""
    key = f"rate{rate:g}_overhead"
    window_s = OVERHEAD_WINDOW_QUICK_S if quick else OVERHEAD_WINDOW_S
    requests = [
        replace(request, max_tokens=min(request.max_tokens, OVERHEAD_TOKENS_MAX))
        for request in workload(min(rate, OVERHEAD_RATE_MAX * scene.instances), window_s, seed=7)
    ]
    scale = OVERHEAD_SCALE[scene.instances]
    with ExitStack() as stack:
        on, off = (
            stack.enter_context(scene_cluster(scene, mode, scale)) for mode in (Mode.REPLICATE, Mode.NONE)
        )

        async def both() -> list[list[Outcome]]:
            started = time.monotonic() + 0.5
            return await asyncio.gather(*(drive(_client(c), requests, scale, started) for c in (on, off)))

        tokens = 0
        latencies = []
        began_s, began_cpu_s = time.monotonic(), _cpu_s()
        for outcomes in asyncio.run(both()):
            tokens += sum(len(o.tokens) for o in outcomes)
            if failed := [o.error for o in outcomes if o.error]:
                raise RuntimeError(f"{len(failed)} requests failed while nothing did: {failed[0]}")
            latencies.append([o.latency_s * scale for o in outcomes])
        idle_s = 2 * scene.nodes * CPU_SHARE_PER_NODE * (time.monotonic() - began_s)
        cpu_s_per_token = (_cpu_s() - began_cpu_s - idle_s) / tokens
    with_copies, without = latencies
    for name, values in (("on", with_copies), ("off", without)):
        result.metrics[f"{key}_latency_mean_{name}_s"] = statistics.fmean(values)
        result.metrics[f"{key}_latency_p99_{name}_s"] = percentile(values, 0.99)
    mean = result.metrics[f"{key}_mean"] = statistics.fmean(with_copies) / statistics.fmean(without) - 1.0
    result.metrics[f"{key}_p99"] = percentile(with_copies, 0.99) / percentile(without, 0.99) - 1.0
    progress(f"  replication adds {mean:.2%} to the mean latency")
    result.metrics[f"rate{rate:g}_cpu_s_per_token"] = cpu_s_per_token
    return cpu_s_per_token


def _cpu_s() -> float:
    """Seconds that this machine's processors have been busy."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _recovery(
    cluster: LocalCluster, rounds: list[tuple[str, ...]], streams: int, result: Result, key: str
) -> None:
    pauses: list[float] = []
    later: list[float] = []
    counts = {"lost": 0, "duplicated": 0, "different": 0, "failed": 0}
    for number, victims in enumerate(rounds):
        requests = _streams(streams, 2000 + number)
        outcomes, killed, killed_unix = asyncio.run(_kill(cluster, requests, victims))
        told = _told(cluster, killed_unix)
        # Where nothing was handed back while streams lived, every pause is the kill's doing.
        recovered = killed + told.recovered_unix - killed_unix if told.handed_back else math.inf
        # Who waited for a place in a batch when the node died was not interrupted.
        begun = [o for o in outcomes if (o.times and o.times[0] <= killed < o.times[-1]) or o.error]
        found = [_pauses_s(outcome, killed, recovered) for outcome in begun]
        slowest = sorted((first for first, _ in found), reverse=True)[: told.streams]
        pauses += slowest
        line = (
            f"  killed {', '.join(victims)}: {told.streams} streams interrupted, slowest {slowest[0]:.3f} s"
        )
        if told.handed_back:
            later += (slowest := sorted((second for _, second in found), reverse=True)[: told.streams])
            line += f"; handed back, slowest {slowest[0]:.3f} s"
        progress(line)
        comparison = compare(outcomes, STAGES, VOCABULARY.stop)
        for name in counts:
            counts[name] += getattr(comparison, name)
        wait_settled(cluster)
    result.metrics |= {
        f"{key}_kills": sum(map(len, rounds)),
        f"{key}_streams": len(pauses),
        f"{key}_p50_s": percentile(pauses, 0.5),
        f"{key}_p99_s": percentile(pauses, 0.99),
        f"{key}_tokens_lost": counts["lost"],
        f"{key}_tokens_duplicated": counts["duplicated"],
        f"{key}_tokens_different": counts["different"],
        f"{key}_requests_failed": counts["failed"],
    }
    if later:
        hand_back = key.replace("recovery", "hand_back")
        result.metrics[f"{hand_back}_p50_s"] = percentile(later, 0.5)
        result.metrics[f"{hand_back}_p99_s"] = percentile(later, 0.99)


async def _kill(
    cluster: LocalCluster, requests: list[Request], victims: tuple[str, ...]
) -> tuple[list[Outcome], float, float]:
    load = asyncio.create_task(drive(_client(cluster), requests, 1.0, time.monotonic() + 0.1))
    await asyncio.sleep(KILL_AT_S)
    killed, killed_unix = time.monotonic(), time.time()
    for victim in victims:
        cluster.kill(victim)
    return await load, killed, killed_unix


def _pauses_s(outcome: Outcome, killed: float, recovered: float) -> tuple[float, float]:
    """The longest wait for a token that began before `recovered`, when every pipeline served again, and the longest
    one after that.

    Of what began before the kill only the part after it counts.
    """
    first, second = [], []
    for earlier, later in itertools.pairwise(outcome.times):
        if earlier >= recovered:
            second.append(later - earlier)
        elif killed < later <= killed + WINDOW_S:
            first.append(later - max(killed, earlier))
    # No token at all in time: the worst that can be said within the window.
    return max(first, default=WINDOW_S), max(second, default=0.0)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the schedulers of the pipelines that were hit have reported since a kill."""

    streams: int
    recovered_unix: float  # when the last one served again
    handed_back: bool


def _told(cluster: LocalCluster, since_unix: float) -> _Told:
    deadline = time.monotonic() + 5.0
    while True:
        with cluster.admin() as admin:
            rows = [row.event for row in admin.events(limit=100) if row.event.unix_s >= since_unix]
        recoveries = [event for event in rows if event.kind is EventKind.RECOVERED]
        # The newest come first: what stays is the first recovery of each pipeline.
        hit = {event.subject: event for event in recoveries if not event.details.get("planned")}
        if hit:
            return _Told(
                sum(int(event.details.get("requests", 0)) for event in hit.values()),
                max(event.unix_s for event in hit.values()),
                any(event.details.get("planned") for event in recoveries),
            )
        if time.monotonic() > deadline:
            raise RuntimeError("no recovery was reported")
        time.sleep(0.1)
