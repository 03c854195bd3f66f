"""What protecting KV costs while nothing fails: the same load on clusters with copies, with parity (XOR over the four
stages) and without either, in turns.

Every round has seeds of its own: blocks that a cluster has had before are copied and coded once, and would cost little
the second time."""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack

from bench.cluster import run_streams, running
from bench.contract import Result, percentile, progress
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import sample_prompts
from controlplane.kfadmin.local import LocalCluster

OPTIONS = ("only",)
STREAMS = 8
TOKENS = 64
# By the name that figures have; parity's settings are the default ones, xor over all stages.
PROTECTED = {"on": Mode.REPLICATE, "parity": Mode.PARITY}
OFF = "off"


def run(quick: bool, only: frozenset[str] = frozenset()) -> Result:
    """`only`: of `replicate` and `parity`."""
    if unknown := only - {mode.value for mode in PROTECTED.values()}:
        sys.exit(f"--only: {', '.join(sorted(unknown))} is none of replicate, parity")
    pairs = 40 if quick else 150  # a pair says little on a shared machine, their median a lot
    modes = {name: mode for name, mode in PROTECTED.items() if not only or mode.value in only}
    result = Result(
        "overhead", settings={"streams": STREAMS, "max_tokens": TOKENS, "pairs": pairs, "quick": quick}
    )
    names = (*modes, OFF)
    means: dict[str, list[float]] = {name: [] for name in names}
    tails: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        clusters = {
            name: stack.enter_context(running(mode)) for name, mode in (modes | {OFF: Mode.NONE}).items()
        }
        for cluster in clusters.values():
            _latencies(cluster, 0)  # warm: connections, code, pages touched
        for pair in range(pairs):
            # The order changes from pair to pair, so that a drift of the machine favours nobody.
            first = pair % len(names)
            for name in names[first:] + names[:first]:
                latencies = _latencies(clusters[name], pair + 1)
                means[name].append(statistics.fmean(latencies))
                tails[name].append(percentile(latencies, 0.99))
            found = ", ".join(f"{name} {means[name][-1]:.3f} s" for name in names)
            progress(f"  pair {pair + 1}/{pairs}: {found}")
    for name in names:
        result.measure(f"latency_mean_{name}_s", means[name])
        result.measure(f"latency_p99_{name}_s", tails[name])
    # Pair by pair, since those of a pair met the machine in the same mood.
    for ratio, values in (("latency_mean", means), ("latency_p99", tails)):
        for name in modes:
            pairwise = [off / on for on, off in zip(values[name], values[OFF], strict=True)]
            key = ratio if name == "on" else f"{ratio}_{name}"
            result.ratios[key] = statistics.median(pairwise)
            result.spread[f"ratios.{key}"] = (min(pairwise), max(pairwise))
    return result


def _latencies(cluster: LocalCluster, number: int) -> list[float]:
    streams = run_streams(cluster, sample_prompts(STREAMS, TOKENS, first_seed=1 + number * STREAMS))
    return [stream.ended - stream.sent for stream in streams]
