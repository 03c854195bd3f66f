"""What protects KV, and what it costs: copies and parity on emulated A10s, and a failure with and without them.

Real processes; the devices and the network are emulated (executor `oracle`, a quarter of Llama-3.1-8B a stage, links
of 10 Gbit/s), at their real lengths and times. All streams are compared with the oracle's definition.

Memory: bytes that copies and parity take of the same requests, on clusters of four and of eight stages.
Steady state: the same new prompts on clusters with copies, with parity and without either, in turns.
Incidents: a node is killed while requests of 1K to 16K tokens run; the time to the next token of the slowest of them
against what `kfadmin protection` said just before. Without protection all is computed again.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.cluster import wait_until
from bench.contract import Result, percentile, progress
from bench.kevlarflow_check import compare
from bench.kevlarflow_load import VOCABULARY, Outcome
from bench.protection_incident import Row, Shape, incident, still
from bench.protection_setup import (
    BLOCK_SIZE,
    INSTANCES,
    LINK_BYTES_PER_S,
    NONE,
    PROFILE,
    REPLICATE,
    REPLICATE8,
    RS41,
    RS82,
    XOR41,
    Policy,
    load,
    long_model,
    protected,
    requests_of,
)
from controlplane.contract.protection import Protection
from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.local import LocalCluster

OPTIONS = ("figures",)
LIVE = (NONE, REPLICATE, XOR41)  # in turns, all through steady state and incidents
ALONE = (RS41, REPLICATE8, RS82)  # for their memory only
# Memory: full blocks and one token more, so that all have the same blocks as long as they run, and looked at when all
# have had some output.
MEMORY_STREAMS, MEMORY_PROMPT, MEMORY_READ, MEMORY_TOKENS = 4, 16 * BLOCK_SIZE + 1, 8, 32
STEADY_STREAMS, STEADY_PROMPT, STEADY_TOKENS = 8, 512, 16
LONG = 16_384
# Of each cluster, not counted: nothing is predicted before one failure has been measured, with blocks enough that
# restoring them is more than the way there and back.
WARM = Shape(1, 4096, 1)
SHAPES_QUICK = (Shape(1, LONG, 2), Shape(4, 1024, 0), Shape(1, LONG, 1), Shape(1, 4096, 3))
SHAPES = (
    *SHAPES_QUICK,
    Shape(1, 8192, 0),
    Shape(8, 512, 2),
    Shape(2, 2048, 1),
    Shape(1, LONG, 3),
    Shape(1, LONG, 2),
)
ROUNDS_QUICK, ROUNDS = 6, 30
SEED_MEMORY, SEED_STEADY, SEED_INCIDENTS = 1, 1_000, 2_000


def run(quick: bool, figures: Path | None = None) -> Result:
    rounds, shapes = (ROUNDS_QUICK, SHAPES_QUICK) if quick else (ROUNDS, SHAPES)
    result = Result(
        "protection",
        settings={
            "instances": INSTANCES, "block_size": BLOCK_SIZE, "profile": PROFILE, "time_scale": 1.0,
            "link_bytes_per_s": LINK_BYTES_PER_S,
            "memory": f"{MEMORY_STREAMS} x {MEMORY_PROMPT} tokens",
            "steady": f"{STEADY_STREAMS} x {STEADY_PROMPT} tokens, {STEADY_TOKENS} out, {rounds} rounds",
            "long_tokens": LONG, "quick": quick,
        },
    )  # fmt: skip
    wrong = _Wrong()
    spent: dict[Policy, int] = {}
    with long_model() as model:
        with ExitStack() as stack:
            clusters = {policy: stack.enter_context(protected(policy, model)) for policy in LIVE}
            for policy in LIVE[1:]:
                spent[policy] = _memory(policy, clusters[policy], wrong)
            _steady(clusters, rounds, result, wrong)
            rows = _incidents(clusters, shapes, wrong)
        for policy in ALONE:
            with protected(policy, model) as cluster:
                spent[policy] = _memory(policy, cluster, wrong)
    fill_memory(result, spent)
    fill_incidents(result, rows)
    result.metrics |= {"tokens_wrong": wrong.tokens, "streams_failed": wrong.streams}
    if figures is not None:
        from bench.protection_figures import draw  # matplotlib is in an extra

        figures.mkdir(parents=True, exist_ok=True)
        for path in draw(figures, rows):
            progress(f"wrote {path}")
    return result


class _Wrong:
    """Tokens that were lost, doubled or different, and streams that ended with an error."""

    def __init__(self) -> None:
        self.tokens = self.streams = 0

    def count(self, outcomes: Sequence[Outcome], stages: int) -> None:
        found = compare(outcomes, stages, VOCABULARY.stop)
        self.tokens += found.lost + found.duplicated + found.different
        self.streams += found.failed


# ---------------------------------------------------------------------- memory


def _memory(policy: Policy, cluster: LocalCluster, wrong: _Wrong) -> int:
    """Bytes of copies or parity of MEMORY_STREAMS requests, once all of their full blocks are protected."""
    outcomes, spent = asyncio.run(_loaded_memory(cluster))
    wrong.count(outcomes, policy.stages)
    progress(f"  {policy.name}: {spent:,} bytes of {'copies' if policy.mode is REPLICATE.mode else 'parity'}")
    return spent


async def _loaded_memory(cluster: LocalCluster) -> tuple[list[Outcome], int]:
    requests = requests_of(MEMORY_STREAMS, MEMORY_PROMPT, MEMORY_TOKENS, SEED_MEMORY)
    running = asyncio.create_task(load(cluster, requests))
    try:
        spent = await asyncio.to_thread(_spent_bytes, cluster)
        return await running, spent
    finally:
        running.cancel()


def _spent_bytes(cluster: LocalCluster) -> int:
    def all_read(status: ClusterStatus) -> bool:
        tokens = sum(pipeline.tokens for pipeline in status.pipelines)
        return tokens >= MEMORY_STREAMS * (MEMORY_PROMPT + MEMORY_READ)

    wait_until(cluster, "prompts to be computed", all_read)
    with cluster.admin() as admin:
        return still(lambda: _protected(admin.protection()), "copies or parity to be complete")


def _protected(now: Protection) -> int:
    """Bytes that are spent; 0 while something is not protected yet."""
    return 0 if now.lag_tokens else now.spent_bytes


def fill_memory(result: Result, spent: Mapping[Policy, int]) -> None:
    """Ratios of parity to copies of the same requests, and how far the worst of them is from K of N."""
    errors = []
    for policy, size in spent.items():
        result.metrics[f"memory_{policy.name}_bytes"] = size
        copies = REPLICATE8 if policy.stages == REPLICATE8.stages else REPLICATE
        if policy not in (REPLICATE, REPLICATE8):
            share = size / spent[copies]
            result.metrics[f"memory_{policy.name}_share"] = share
            errors.append(abs(share / policy.share - 1))
    result.metrics["memory_share_error"] = max(errors)


# ---------------------------------------------------------------------- steady state


def _steady(clusters: Mapping[Policy, LocalCluster], rounds: int, result: Result, wrong: _Wrong) -> None:
    latencies: dict[Policy, list[float]] = {policy: [] for policy in clusters}
    rates: dict[Policy, list[float]] = {policy: [] for policy in clusters}
    for number in range(rounds + 1):
        requests = requests_of(STEADY_STREAMS, STEADY_PROMPT, STEADY_TOKENS, SEED_STEADY + number)
        for policy in in_turn(tuple(clusters), number):
            began = time.monotonic()
            outcomes = asyncio.run(load(clusters[policy], requests))
            wrong.count(outcomes, policy.stages)
            if number:  # the first round warms up
                latencies[policy].append(statistics.fmean(one.latency_s for one in outcomes))
                ended = max(one.times[-1] for one in outcomes)
                rates[policy].append(sum(len(one.tokens) for one in outcomes) / (ended - began))
        if number:
            found = ", ".join(f"{policy.name} {latencies[policy][-1]:.3f}" for policy in clusters)
            progress(f"  round {number}/{rounds}, mean latency in s: {found}")
    for policy in clusters:
        into = "baseline" if policy is NONE else "metrics"
        result.measure(f"latency_mean_{policy.name}_s", latencies[policy], into)
        result.measure(f"tokens_per_s_{policy.name}", rates[policy], into)
    for name, ours, theirs in (
        ("cost_parity", XOR41, NONE),
        ("cost_replicate", REPLICATE, NONE),
        ("cost_parity_of_replicate", XOR41, REPLICATE),
    ):
        # Round by round, since those of a round met the machine in the same mood.
        result.measure(f"{name}_latency", costs(latencies[ours], latencies[theirs]))
        result.measure(f"{name}_tokens_per_s", costs(rates[theirs], rates[ours]))


def in_turn(policies: tuple[Policy, ...], number: int) -> tuple[Policy, ...]:
    """Each is first in turn, so that a drift of the machine favours nobody."""
    first = number % len(policies)
    return policies[first:] + policies[:first]


def costs(with_it: Sequence[float], without: Sequence[float]) -> list[float]:
    """What each measurement of a pair has more than the other, as a share of that."""
    return [ours / theirs - 1 for ours, theirs in zip(with_it, without, strict=True)]


# ---------------------------------------------------------------------- incidents


def _incidents(clusters: Mapping[Policy, LocalCluster], shapes: Sequence[Shape], wrong: _Wrong) -> list[Row]:
    rows = []
    for number, shape in enumerate((WARM, *shapes)):
        for policy in in_turn(tuple(clusters), number):
            row, found = incident(clusters[policy], policy, shape, SEED_INCIDENTS + number)
            wrong.tokens += found.lost + found.duplicated + found.different
            wrong.streams += found.failed
            if number:
                rows.append(row)
    return rows


def fill_incidents(result: Result, rows: Sequence[Row]) -> None:
    """Recovery of the long request by policy, and how good predictions were."""
    for policy in LIVE:
        found = [r.measured_s for r in rows if r.policy == policy.name and r.shape.prompt_tokens == LONG]
        result.measure(f"recovery_16k_{policy.name}_s", found, "baseline" if policy is NONE else "metrics")
    for policy in LIVE[1:]:
        ours = result.metrics[f"recovery_16k_{policy.name}_s"]
        result.ratios[f"recovery_16k_{policy.name}"] = result.baseline[f"recovery_16k_{NONE.name}_s"] / ours
    result.metrics["incidents"] = len(rows)
    result.metrics["predicted_within_share"] = sum(row.within for row in rows) / len(rows)
    for policy in LIVE:
        own = [row for row in rows if row.policy == policy.name]
        result.metrics[f"predicted_within_{policy.name}"] = sum(row.within for row in own) / len(own)
    off = [abs(row.predicted_s / row.measured_s - 1) for row in rows if row.predicted_s is not None]
    if off:
        result.metrics["predicted_off_p50"] = statistics.median(off)
        result.metrics["predicted_off_p90"] = percentile(off, 0.9)
    result.rows = [row.told() for row in rows]
