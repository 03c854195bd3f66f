"""What replication costs while nothing fails: the same load on two clusters, alternating, one of them unprotected."""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from bench.cluster import run_streams, running
from bench.contract import Result, percentile, progress
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import sample_prompts
from controlplane.kfadmin.local import LocalCluster

STREAMS = 8
TOKENS = 64


def run(quick: bool) -> Result:
    pairs = 40 if quick else 150  # a pair says little on a shared machine, their median a lot
    result = Result(
        "overhead", settings={"streams": STREAMS, "max_tokens": TOKENS, "pairs": pairs, "quick": quick}
    )
    means: dict[str, list[float]] = {"on": [], "off": []}
    tails: dict[str, list[float]] = {"on": [], "off": []}
    with ExitStack() as stack:
        clusters = {
            "on": stack.enter_context(running(Mode.REPLICATE)),
            "off": stack.enter_context(running(Mode.NONE)),
        }
        for cluster in clusters.values():
            _latencies(cluster)  # warm: connections, prompts tokenised once, pages touched
        for pair in range(pairs):
            # The order changes from pair to pair, so that a drift of the machine favours nobody.
            order = ("on", "off") if pair % 2 == 0 else ("off", "on")
            for name in order:
                latencies = _latencies(clusters[name])
                means[name].append(statistics.fmean(latencies))
                tails[name].append(percentile(latencies, 0.99))
            progress(f"  pair {pair + 1}/{pairs}: on {means['on'][-1]:.3f} s, off {means['off'][-1]:.3f} s")
    for name in ("on", "off"):
        result.measure(f"latency_mean_{name}_s", means[name])
        result.measure(f"latency_p99_{name}_s", tails[name])
    # Pair by pair, since the two of a pair met the machine in the same mood.
    for ratio, values in (("latency_mean", means), ("latency_p99", tails)):
        pairwise = [off / on for on, off in zip(values["on"], values["off"], strict=True)]
        result.ratios[ratio] = statistics.median(pairwise)
        result.spread[f"ratios.{ratio}"] = (min(pairwise), max(pairwise))
    return result


def _latencies(cluster: LocalCluster) -> list[float]:
    streams = run_streams(cluster, sample_prompts(STREAMS, TOKENS))
    return [stream.ended - stream.sent for stream in streams]
