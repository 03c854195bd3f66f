"""What is measured in real time, at time scale 1: the cost of replication while nothing fails, and recovery."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

from bench.cluster import wait_settled
from bench.contract import Result, percentile, progress
from bench.kevlarflow_check import compare
from bench.kevlarflow_load import OUTPUT_MEAN, VOCABULARY, Client, Outcome, Request, drive, workload
from bench.kevlarflow_setup import MAX_RUNNING, STAGES, Scene, scene_cluster
from controlplane.contract.events import EventKind
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster

TPOT_S = 0.163
PAIRS, PAIRS_QUICK = 20, 4
OVERHEAD_TOKENS = 24
RECOVERY_TOKENS = 40
KILL_AFTER_S = 2.5  # all are past their prompts by then
WINDOW_S = 5.0  # a pause that ends later than this after a kill is not its doing


def measure_steady(scene: Scene, rate: float, quick: bool, result: Result) -> None:
    """Fills in `overhead_*` and `recovery_*`, with as many streams as `rate` keeps running."""
    streams = round(min(MAX_RUNNING * scene.instances, rate * OUTPUT_MEAN * TPOT_S))
    result.settings["steady_streams"] = streams
    with ExitStack() as stack:
        on, off = (
            stack.enter_context(scene_cluster(scene, mode, 1.0)) for mode in (Mode.REPLICATE, Mode.NONE)
        )
        _overhead({"on": on, "off": off}, streams, PAIRS_QUICK if quick else PAIRS, result)
        # The scene's own victims, and then those that have the schedulers: a loss that the paper leaves out.
        rounds = [scene.victims, *(_of_stage(scene, k) for k in ((0,) if quick else (0, 1, 3)))]
        _recovery(on, rounds, streams, result)


def _of_stage(scene: Scene, stage: int) -> tuple[str, ...]:
    """Other victims, in the same instances."""
    return tuple(f"n{int(victim[1:]) // STAGES * STAGES + stage}" for victim in scene.victims)


def _requests(streams: int, tokens: int, seed: int) -> list[Request]:
    """Prompts of the usual lengths, all at once, with outputs of one length."""
    return [
        replace(request, at_s=0.0, max_tokens=tokens) for request in workload(1.0, 1e9, seed, limit=streams)
    ]


def _client(cluster: LocalCluster) -> Client:
    return Client(cluster.gateway_url, cluster.api_key, cluster.config.model_name)


def _overhead(clusters: dict[str, LocalCluster], streams: int, pairs: int, result: Result) -> None:
    """Latency with copies against latency without: the same batch on both, alternating."""
    means: dict[str, list[float]] = {"on": [], "off": []}
    tails: dict[str, list[float]] = {"on": [], "off": []}
    for pair in range(-1, pairs):  # the first one warms up
        requests = _requests(streams, OVERHEAD_TOKENS, 1000 + pair)
        for name in ("on", "off") if pair % 2 else ("off", "on"):
            outcomes = asyncio.run(drive(_client(clusters[name]), requests, 1.0, time.monotonic() + 0.1))
            if failed := [o.error for o in outcomes if o.error]:
                raise RuntimeError(f"{len(failed)} requests failed while nothing did: {failed[0]}")
            if pair >= 0:
                means[name].append(statistics.fmean(o.latency_s for o in outcomes))
                tails[name].append(percentile([o.latency_s for o in outcomes], 0.99))
        if pair >= 0:
            progress(
                f"  pair {pair + 1}/{pairs}: replicated {means['on'][-1]:.3f} s, not {means['off'][-1]:.3f} s"
            )
    for measure, values in (("mean", means), ("p99", tails)):
        for name in ("on", "off"):
            result.measure(f"overhead_latency_{measure}_{name}_s", values[name])
        # Pair by pair, since the two of a pair met the machine in the same mood.
        shares = [on / off - 1.0 for on, off in zip(values["on"], values["off"], strict=True)]
        result.measure(f"overhead_{measure}", shares)


def _recovery(cluster: LocalCluster, rounds: list[tuple[str, ...]], streams: int, result: Result) -> None:
    pauses: list[float] = []
    counts = {"lost": 0, "duplicated": 0, "different": 0, "failed": 0}
    for number, victims in enumerate(rounds):
        requests = _requests(streams, RECOVERY_TOKENS, 2000 + number)
        outcomes, killed, killed_unix = asyncio.run(_kill(cluster, requests, victims))
        hit = _interrupted(cluster, killed_unix)
        slowest = sorted((_pause_s(outcome, killed) for outcome in outcomes), reverse=True)[:hit]
        pauses += slowest
        progress(f"  killed {', '.join(victims)}: {hit} streams interrupted, slowest {slowest[0]:.3f} s")
        comparison = compare(outcomes, STAGES, VOCABULARY.stop)
        for name in counts:
            counts[name] += getattr(comparison, name)
        wait_settled(cluster)
    result.metrics |= {
        "recovery_kills": sum(map(len, rounds)),
        "recovery_streams": len(pauses),
        "recovery_p50_s": percentile(pauses, 0.5),
        "recovery_p99_s": percentile(pauses, 0.99),
        "recovery_tokens_lost": counts["lost"],
        "recovery_tokens_duplicated": counts["duplicated"],
        "recovery_tokens_different": counts["different"],
        "recovery_requests_failed": counts["failed"],
    }


async def _kill(
    cluster: LocalCluster, requests: list[Request], victims: tuple[str, ...]
) -> tuple[list[Outcome], float, float]:
    load = asyncio.create_task(drive(_client(cluster), requests, 1.0, time.monotonic() + 0.1))
    await asyncio.sleep(KILL_AFTER_S)
    killed, killed_unix = time.monotonic(), time.time()
    for victim in victims:
        cluster.kill(victim)
    return await load, killed, killed_unix


def _pause_s(outcome: Outcome, moment: float) -> float:
    """The longest wait for a token after the kill; of what is earlier only the part after it counts."""
    times = outcome.times
    return max(
        (
            later - max(moment, earlier)
            for earlier, later in itertools.pairwise(times)
            if moment < later <= moment + WINDOW_S
        ),
        default=WINDOW_S,  # none came at all: the worst that can be said within the window
    )


def _interrupted(cluster: LocalCluster, since_unix: float) -> int:
    """Streams of the pipelines that were hit, as their schedulers tell."""
    deadline = time.monotonic() + 5.0
    while True:
        with cluster.admin() as admin:
            rows = [row.event for row in admin.events(limit=100) if row.event.unix_s >= since_unix]
        hit = sum(
            int(event.details.get("requests", 0))
            for event in rows
            if event.kind is EventKind.RECOVERED and not event.details.get("planned")
        )
        if hit:
            return hit
        if time.monotonic() > deadline:
            raise RuntimeError("no recovery was reported")
        time.sleep(0.1)
