"""What certificates and sealed links cost: the same load on two clusters, alternating, one of them with certificates.

Links are TCP in both, as between hosts: within a host they are shared memory, which is never sealed.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from bench.cluster import run_streams, running
from bench.contract import Result, progress
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import sample_prompts
from controlplane.kfadmin.local import LocalCluster

STREAMS = 16
TOKENS = 64


def run(quick: bool) -> Result:
    pairs = 8 if quick else 60
    result = Result(
        "secure", settings={"streams": STREAMS, "max_tokens": TOKENS, "pairs": pairs, "quick": quick}
    )
    rates: dict[str, list[float]] = {"on": [], "off": []}
    with ExitStack() as stack:
        clusters = {
            name: stack.enter_context(running(Mode.REPLICATE, transport="sockets", secure=name == "on"))
            for name in rates
        }
        for cluster in clusters.values():
            _rate(cluster)  # warm: connections, prompts tokenised once, pages touched
        for pair in range(pairs):
            # The order changes from pair to pair, so that a drift of the machine favours nobody.
            for name in ("on", "off") if pair % 2 == 0 else ("off", "on"):
                rates[name].append(_rate(clusters[name]))
            progress(
                f"  pair {pair + 1}/{pairs}: on {rates['on'][-1]:.0f}, off {rates['off'][-1]:.0f} tokens/s"
            )
    for name, found in rates.items():
        result.measure(f"tokens_per_s_{name}", found)
    pairwise = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    result.ratios["tokens_per_s"] = statistics.median(pairwise)
    result.spread["ratios.tokens_per_s"] = (min(pairwise), max(pairwise))
    return result


def _rate(cluster: LocalCluster) -> float:
    """Tokens/s over all streams."""
    began = time.monotonic()
    streams = run_streams(cluster, sample_prompts(STREAMS, TOKENS))
    return sum(len(stream.tokens) for stream in streams) / (time.monotonic() - began)
