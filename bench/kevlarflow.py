"""The evaluation of the KevlarFlow paper on clusters of ours: a node dies under load, with our design and without.

Real node processes, control plane, gateway and etcd; the devices are emulated (executor `oracle`, an A10 that runs a
quarter of Llama-3.1-8B), and so are the links of 1 Gbps between four sites. Emulated times (steps, links, arrivals, the
reload of 600 s) run `time_scale` times faster; what is real (detection, control plane, gateway, Python) is not, and
counts `time_scale`-fold in the figures, which are all in emulated seconds. That is to our disadvantage: the baseline's
queues hide it.

Recovery and the cost of replication are measured at time scale 1, apart.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.contract import Result, percentile, progress
from bench.kevlarflow_check import Comparison, compare
from bench.kevlarflow_load import (
    OUTPUT_MAX,
    OUTPUT_MEAN,
    OUTPUT_SIGMA,
    PROMPT_MAX,
    PROMPT_MEAN,
    PROMPT_SIGMA,
    VOCABULARY,
    Client,
    Outcome,
    Request,
    drive,
    workload,
)
from bench.kevlarflow_paper import compare_with_paper, draw, note_run
from bench.kevlarflow_setup import (
    FAIL_AT_S,
    MAX_RUNNING,
    RELOAD_S,
    SCENES,
    STAGES,
    Scene,
    scene_cluster,
)
from bench.kevlarflow_steady import measure_steady
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster

OPTIONS = ("scene", "rate", "figures", "time_scale")
# Two processors at time scale 1: a token takes about 0.2 ms of them in both systems together with all that serves it,
# a node of either 1.5 % when idle. A scale that fills them by two thirds leaves what is measured its own time.
CPU_SHARE, CPU_S_PER_TOKEN, CPU_SHARE_PER_NODE = 1.35, 2.2e-4, 0.015
TIME_SCALE_MAX = 4.0
SERVED_PER_INSTANCE = 1.4  # requests per second: see MAX_RUNNING
WINDOW_S = RELOAD_S  # emulated seconds of arrivals: as long as the baseline's instance is away
WINDOW_QUICK_S = {1: 450.0, 2: 120.0, 3: 60.0}
NOTE = "detection, control plane, gateway, Python: real, not scaled; at time_scale N they weigh N-fold"
MEASURES = ("ttft_mean", "ttft_p99", "latency_mean", "latency_p99")


def run(
    quick: bool,
    scene: int = 1,
    rate: float | None = None,
    figures: Path | None = None,
    time_scale: float | None = None,
) -> Result:
    chosen = SCENES[scene]
    rates = (rate,) if rate else (chosen.rates[1],) if quick else chosen.rates
    window_s = WINDOW_QUICK_S[scene] if quick else WINDOW_S
    result = Result("kevlarflow", settings=_settings(chosen, rates, window_s, quick))
    progress(f"{chosen.title}. {NOTE}")
    measure_steady(chosen, rates[0], quick, result)
    for each in rates:
        scale = time_scale or _carried(chosen, each)
        ours, theirs = asyncio.run(_side_by_side(chosen, each, window_s, scale))
        _fill(result, each, scale, ours, theirs)
        note_run(result, scene, each, figures)
    compare_with_paper(result, scene, rates)
    if figures is not None:
        draw(figures, result)
    return result


def _carried(scene: Scene, rate: float) -> float:
    """The time scale that this machine bears while both systems run."""
    healthy = scene.instances - len(scene.victims)
    served = sum(min(rate, SERVED_PER_INSTANCE * instances) for instances in (scene.instances, healthy))
    share = CPU_SHARE - 2 * scene.nodes * CPU_SHARE_PER_NODE
    return max(1.0, min(TIME_SCALE_MAX, round(share / (served * OUTPUT_MEAN * CPU_S_PER_TOKEN), 1)))


def _settings(scene: Scene, rates: Sequence[float], window_s: float, quick: bool) -> dict[str, object]:
    return {
        "scene": scene.number,
        "scene_title": scene.title,
        "victims": scene.victims,
        "rates": list(rates),
        "arrivals_s": window_s,
        "fail_at_s": FAIL_AT_S,
        "reload_s": RELOAD_S,
        "max_running": MAX_RUNNING,
        "prompt_tokens": f"log-normal, mean {PROMPT_MEAN:g}, sigma {PROMPT_SIGMA:g}, at most {PROMPT_MAX}",
        "output_tokens": f"log-normal, mean {OUTPUT_MEAN:g}, sigma {OUTPUT_SIGMA:g}, at most {OUTPUT_MAX}",
        "note": NOTE,
        "quick": quick,
    }


async def _side_by_side(
    scene: Scene, rate: float, window_s: float, scale: float
) -> tuple[list[Outcome], list[Outcome]]:
    """Ours and the baseline at the same time, the same requests and the same failure."""
    requests = workload(rate, window_s)
    progress(f"scene {scene.number}, {rate:g} req/s: {len(requests)} requests, time scale {scale:g}")
    with ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(scene_cluster(scene, mode, scale))
            for mode in (Mode.REPLICATE, Mode.STOP_RESTART)
        )
        started = time.monotonic() + 0.5
        return await asyncio.gather(
            _one(ours, "ours", scene, requests, scale, started),
            _one(theirs, "stop-restart", scene, requests, scale, started),
        )


async def _one(
    cluster: LocalCluster, name: str, scene: Scene, requests: list[Request], scale: float, started: float
) -> list[Outcome]:
    ended = 0

    def count(_: Outcome) -> None:
        nonlocal ended
        ended += 1
        if ended % max(1, len(requests) // 5) == 0:
            at = (time.monotonic() - started) * scale
            progress(f"  {name}: {ended} of {len(requests)} after {at:.0f} s")

    client = Client(cluster.gateway_url, cluster.api_key, cluster.config.model_name)
    failure = asyncio.create_task(_fail(cluster, scene.victims, started, scale))
    try:
        outcomes = await drive(client, requests, scale, started, count)
        if not failure.done() or failure.exception() is None:
            return outcomes
        raise RuntimeError("the failure was not injected") from failure.exception()
    finally:
        failure.cancel()
        await asyncio.gather(failure, return_exceptions=True)


async def _fail(cluster: LocalCluster, victims: Sequence[str], started: float, scale: float) -> None:
    """kill -9, and a replacement only when a new machine would be there."""
    await asyncio.sleep(started + FAIL_AT_S / scale - time.monotonic())
    held = (
        cluster.config.mode is not Mode.STOP_RESTART
    )  # there the launcher waits by itself, for all of the instance
    for victim in victims:
        if held:
            cluster.hold(victim)
        cluster.kill(victim)
    await asyncio.sleep(RELOAD_S / scale)
    for victim in victims if held else ():
        cluster.release(victim)


def _fill(result: Result, rate: float, scale: float, ours: list[Outcome], theirs: list[Outcome]) -> None:
    key = f"rate{rate:g}"
    result.metrics[f"{key}_time_scale"] = scale
    result.metrics[f"{key}_requests"] = len(ours)
    for outcomes, into in ((ours, result.metrics), (theirs, result.baseline)):
        sound = [outcome for outcome in outcomes if not outcome.error]
        if not sound:
            raise RuntimeError(f"no request succeeded: {outcomes[0].error}")
        ttft = [outcome.ttft_s * scale for outcome in sound]
        latency = [outcome.latency_s * scale for outcome in sound]
        per_token = [
            scale * (o.times[-1] - o.times[0]) / (len(o.times) - 1) for o in sound if len(o.times) > 1
        ]
        into |= {
            f"{key}_ttft_mean_s": statistics.fmean(ttft),
            f"{key}_ttft_p99_s": percentile(ttft, 0.99),
            f"{key}_latency_mean_s": statistics.fmean(latency),
            f"{key}_latency_p99_s": percentile(latency, 0.99),
            f"{key}_tpot_mean_s": statistics.fmean(per_token),
        }
        _count(into, key, compare(outcomes, STAGES, VOCABULARY.stop))
    for measure in MEASURES:
        name = f"{key}_{measure}"
        result.ratios[name] = float(result.baseline[f"{name}_s"]) / float(result.metrics[f"{name}_s"])


def _count(into: dict[str, float | int], key: str, comparison: Comparison) -> None:
    into |= {
        f"{key}_requests_failed": comparison.failed,
        f"{key}_tokens_lost": comparison.lost,
        f"{key}_tokens_duplicated": comparison.duplicated,
        f"{key}_tokens_different": comparison.different,
    }
