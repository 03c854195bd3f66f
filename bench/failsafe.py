"""FailSafe's evaluation (arXiv 2511.14116), by simulation: no GPU takes part, and every time is calculated.

What is real: the policies (dataplane/core/ranks, kernels/ranks/layout.py) that route, place, back up and plan, and the
traces of faults and requests. What is not: an H100, its links and how long they take (bench/failsafe_model.py), and
that requests wait in any number. Everything that is compared has the same cost model.

- full: tokens a second of 8 to 5 ranks without faults; how even ranks are.
- recovery: 64 requests of 16K tokens, or as many as the ranks that are left have room for, when one to three ranks die:
  until KV and weights are there, against computing the KV again.
- traces: tokens a second while nodes fail and come back, against standard fault behaviour. A part of a trace of spot
  nodes step by step (without `--quick` of both), and the whole of each from what each number of ranks serves.

`_float` is ours with the usual sums, which have other bits on another number of ranks; ours has exact sums."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.contract import Result, progress
from bench.failsafe_model import (
    ATTENTION_REACHED,
    BANDWIDTH,
    BLOCK_TOKENS,
    EXACT_SUM_BYTES,
    LINK_REACHED,
    LLAMA_70B,
    MATRIX_REACHED,
    MEMORY_REACHED,
    MEMORY_USED,
    MIXTRAL_8X22B,
    Cost,
    Model,
    Work,
)
from bench.failsafe_systems import (
    DETECT_S,
    DISK_BYTES_PER_S,
    START_S,
    Ours,
    Outcome,
    restart_s,
    shape_of,
    standard,
)
from bench.failsafe_traces import (
    AZURE,
    FAULTS,
    MOONCAKE,
    RANKS,
    SPOT_G4DN,
    SPOT_P3,
    FaultTrace,
    Group,
    Lengths,
    azure,
    data_folder,
    fault_trace,
    mooncake,
    spot_trace,
)
from bench.failsafe_whole import Rates, ceiling, whole_trace
from dataplane.core.ranks.backup import Backup
from dataplane.core.ranks.recovery import Held, plan
from dataplane.core.ranks.routing import Router
from kernels.ranks.layout import first_layout, next_layout

OPTIONS = ("figures",)
MODELS = (LLAMA_70B, MIXTRAL_8X22B)
LOST3 = RANKS - 3
CONTEXT, CONTEXTS = 16_384, 64  # of the recovery: tokens, requests
# Quick and full, in simulated time: without faults, and of a trace, step by step.
STEADY_S, WINDOW_S = (200.0, 900.0), (1200.0, 4 * 3600.0)
SPOT = ("spot-p3", "spot-g4dn")  # the other trace is a year
Case = tuple[Model, str]


def run(quick: bool, figures: Path | None = None) -> Result:
    steady_s, window_s = (times[not quick] for times in (STEADY_S, WINDOW_S))
    result = Result("failsafe", settings(quick, steady_s, window_s))
    folder = data_folder()
    if missing := [
        name for name in (FAULTS, SPOT_P3, SPOT_G4DN, AZURE, MOONCAKE) if not (folder / name).is_file()
    ]:
        result.absent["all"] = (
            f"{folder} has no {', '.join(missing)}: set KF_TRACES to a folder that has them"
        )
        return result
    requests = {"azure": azure(folder), "mooncake": mooncake(folder)}
    cases = list(itertools.product(MODELS, requests))
    rates = {case: full(result, case, requests[case[1]], steady_s) for case in cases}
    summarise_full(result)
    recoveries(result)
    traces = [
        spot_trace(folder, SPOT_P3, "spot-p3"),
        spot_trace(folder, SPOT_G4DN, "spot-g4dn"),
        fault_trace(folder),
    ]
    timelines = under_traces(result, traces, cases, requests, rates, window_s)
    if figures is not None:
        from bench.failsafe_figures import draw_all  # matplotlib is only there with `.[bench]`

        figures.mkdir(parents=True, exist_ok=True)
        for path in draw_all(figures, result, timelines):
            progress(f"  drawn: {path}")
    return result


def settings(quick: bool, steady_s: float, window_s: float) -> dict[str, object]:
    return {
        "simulated": "all but policies and traces: no GPU was used, times are calculated (bench/failsafe_model.py)",
        "device": "H100 SXM5 80 GB (data sheet)", "ranks": RANKS, "matrix_reached": MATRIX_REACHED,
        "attention_reached": ATTENTION_REACHED, "memory_reached": MEMORY_REACHED, "link_reached": LINK_REACHED,
        "memory_used": MEMORY_USED, "host_bytes_per_s": BANDWIDTH.host, "peer_bytes_per_s": BANDWIDTH.peer,
        "detect_s": DETECT_S, "engine_start_s": START_S, "disk_bytes_per_s": DISK_BYTES_PER_S,
        "restart_s": {model.name: restart_s(model) for model in MODELS}, "steady_s": steady_s, "window_s": window_s,
        "context": CONTEXT, "contexts": CONTEXTS, "quick": quick,
    }  # fmt: skip


# ---------------------------------------------------------------------- without faults


def full(result: Result, case: Case, lengths: Sequence[Lengths], seconds: float) -> Rates:
    """Of each number of ranks, of ours and of standard."""
    model, requests = case
    ours: dict[int, float] = {}
    usual_rate: dict[int, float] = {}
    theirs: dict[int, float] = {}
    in_flight: dict[int, float] = {}
    for ranks in range(RANKS, 0, -1):
        group = Group(frozenset(range(ranks)), ())
        exact, usual = (Ours(model, lengths, group, seconds, exact=kind) for kind in (True, False))
        outcome = exact.run()
        ours[ranks] = outcome.tokens_per_s
        if not outcome.served.tokens:
            continue
        outcome_usual = usual.run()
        usual_rate[ranks] = outcome_usual.tokens_per_s
        row: dict[str, float | int | str] = {
            "part": "full", "model": model.name, "requests": requests, "ranks": ranks,
            "tokens_per_s": outcome.tokens_per_s, "tokens_per_s_float": outcome_usual.tokens_per_s,
            "kv_max_min": spread(outcome), "compute_max_mean": compute(outcome),
        }  # fmt: skip
        if ranks & (ranks - 1) == 0:
            # Powers of two are cut alike by both: standard is ours with the usual sums.
            theirs[ranks] = outcome_usual.tokens_per_s
            in_flight[ranks] = sum(each.computed for each in usual.engine.running()) / 2
        result.rows.append(row)
    progress(
        f"  {model.name}, {requests}: {ours[RANKS]:.0f} tokens/s of 8 ranks, {ours[LOST3] / ours[RANKS]:.2f} of 5"
    )
    return Rates(ours, usual_rate, theirs, in_flight)


def spread(outcome: Outcome) -> float:
    """Fullest against emptiest rank, the mean over time once the first quarter has passed."""
    kept = outcome.served.kv_spread[len(outcome.served.kv_spread) // 4 :]
    return sum(seconds * value for seconds, value in kept) / sum(seconds for seconds, _ in kept)


def compute(outcome: Outcome) -> float:
    return outcome.served.compute_s / outcome.served.compute_mean_s


def summarise_full(result: Result) -> None:
    rows = [row for row in result.rows if row["part"] == "full"]
    by = {(row["model"], row["requests"], row["ranks"]): row for row in rows}
    places = sorted({(row["model"], row["requests"]) for row in rows}, key=str)
    shares = {}
    for kind in ("", "_float"):
        shares[kind] = [
            number(by[*place, LOST3][f"tokens_per_s{kind}"])
            / number(by[*place, RANKS][f"tokens_per_s{kind}"])
            for place in places
        ]
        result.metrics[f"tokens_per_s{kind}"] = geometric(
            number(by[*place, RANKS][f"tokens_per_s{kind}"]) for place in places
        )
        result.metrics[f"lost3_share{kind}"] = geometric(shares[kind])
        result.spread[f"metrics.lost3_share{kind}"] = (min(shares[kind]), max(shares[kind]))
    odd = [row for row in rows if LOST3 <= number(row["ranks"]) < RANKS]  # those that 8 heads are not even on
    for name in ("kv_max_min", "compute_max_mean"):
        values = [number(row[name]) for row in odd]
        result.metrics[name] = statistics.mean(values)
        result.metrics[f"{name}_worst"] = max(values)


def number(value: float | int | str) -> float:
    return float(value)


def geometric(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))


# ---------------------------------------------------------------------- recovery


def recoveries(result: Result) -> None:
    times: dict[str, list[float]] = {"recovery": [], "recompute": []}
    for model, lost in itertools.product(MODELS, (1, 2, 3)):
        contexts, restored, weights, recomputed = recovery(model, lost)
        result.rows.append({
            "part": "recovery", "model": model.name, "lost": lost, "contexts": contexts,
            "recovery_s": restored, "of_weights_s": weights,
            "recompute_s": recomputed, "ratio": recomputed / restored,
        })  # fmt: skip
        progress(f"  {model.name}, {lost} lost: {restored:.3f} s, computed again {recomputed:.1f} s")
        if lost == 1:
            times["recovery"].append(restored)
            times["recompute"].append(recomputed)
    result.metrics["recovery_s"] = geometric(times["recovery"])
    result.baseline["recompute_s"] = geometric(times["recompute"])
    ratios = [slow / fast for fast, slow in zip(times["recovery"], times["recompute"], strict=True)]
    result.ratios["recovery"] = geometric(ratios)
    result.spread["ratios.recovery"] = (min(ratios), max(ratios))
    result.metrics["pause_p99_s"] = DETECT_S + max(
        number(row["recovery_s"]) for row in result.rows if row["part"] == "recovery" and row["lost"] == 1
    )


def recovery(model: Model, lost: int) -> tuple[int, float, float, float]:
    """Contexts, and seconds from the decision until all is there: of the plan, of the same without KV, and with the
    same weights and all KV computed again on the ranks that are left."""
    before = first_layout(shape_of(model), RANKS)
    after = next_layout(before, before.ranks[lost:])
    router, backup = Router(before.ranks), Backup(before.ranks)
    blocks = CONTEXT // BLOCK_TOKENS
    cost = Cost(model, after, EXACT_SUM_BYTES)
    room = cost.blocks() * len(after.ranks) // (blocks * model.layers * model.kv_heads)
    contexts = min(CONTEXTS, room)
    for request in range(contexts):
        router.submit(request, CONTEXT, CONTEXT)
        backup.filled(request, blocks)
    while pages := backup.next():
        for page in pages:
            backup.acknowledge(page)
    gone = before.ranks[:lost]
    held = [
        Held(request, owner(router, request), blocks, backup.there(request, gone))
        for request in range(contexts)
    ]
    router.change(after.ranks)
    owners = {request: owner(router, request) for request in range(contexts)}
    sizes = model.sizes
    restored = plan(before, after, held, owners, sizes).seconds(sizes, BANDWIDTH)
    weights = plan(before, after, [], {}, sizes).seconds(sizes, BANDWIDTH)
    return contexts, restored, weights, weights + prefill_s(cost, contexts)


def owner(router: Router, request: int) -> int:
    found = router.owner(request)
    assert found is not None
    return found


def prefill_s(cost: Cost, contexts: int) -> float:
    """Of all contexts, in batches that are drawn evenly."""
    router = Router(cost.ranks, token_pairs=cost.token_pairs)
    for request in range(contexts):
        router.submit(request, CONTEXT)
    seconds = 0.0
    while chunks := router.draw(8192):
        owned: dict[int, Work] = {}
        for chunk in chunks:
            pairs = chunk.tokens * chunk.start + chunk.tokens * (chunk.tokens + 1) / 2
            owned.setdefault(chunk.rank, Work()).add(chunk.tokens, pairs)
        seconds += cost.step(owned, 0).seconds
    return seconds


# ---------------------------------------------------------------------- traces


def under_traces(
    result: Result,
    traces: Sequence[FaultTrace],
    cases: Sequence[Case],
    requests: dict[str, list[Lengths]],
    rates: dict[Case, Rates],
    window_s: float,
) -> dict[str, dict[str, list[Outcome]]]:
    """Returns what was simulated step by step, by what it is called, for the figures."""
    timelines: dict[str, dict[str, list[Outcome]]] = {}
    ratios: dict[str, list[float]] = {}
    stepped = SPOT if window_s > WINDOW_S[0] else SPOT[:1]
    for trace, case in itertools.product(traces, cases):
        model, kind = case
        row: dict[str, float | int | str] = {
            "part": "trace", "trace": trace.name, "model": model.name, "requests": kind,
        }  # fmt: skip
        row |= whole_trace(trace, model, rates[case])
        if trace.name in stepped:
            start_s = min(3600.0, max(0.0, trace.seconds - window_s))
            part = trace.window(start_s, min(window_s, trace.seconds - start_s))
            found = step_by_step(part, model, requests[kind])
            timelines[f"{trace.name}, {model.name}, {kind}"] = found
            for name, outcomes in found.items():
                row[f"stepped_{name}"] = sum(each.tokens_per_s for each in outcomes)
            row["stepped_ratio"] = number(row["stepped_ours"]) / number(row["stepped_standard"])
            row["stepped_ratio_float"] = number(row["stepped_float"]) / number(row["stepped_standard"])
            row["stepped_ceiling_ratio"] = ceiling(part, rates[case]) / number(row["stepped_standard"])
            pauses = [pause for outcome in found["ours"] for pause in outcome.pauses]
            if pauses:
                row["stepped_pause_max_s"] = max(pauses)
        row["ratio"] = number(row["whole_ours"]) / number(row["whole_standard"])
        row["ratio_float"] = number(row["whole_float"]) / number(row["whole_standard"])
        result.rows.append(row)
        ratios.setdefault(trace.name, []).append(number(row["ratio"]))
        ratios.setdefault(f"{trace.name}_float", []).append(number(row["ratio_float"]))
        for name in ("stepped_ratio", "stepped_ratio_float", "ceiling_ratio", "stepped_ceiling_ratio"):
            if name in row:
                ratios.setdefault(f"{trace.name}_{name.replace('_ratio', '')}", []).append(number(row[name]))
        told = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if "ratio" in name)
        progress(f"  {trace.name}, {model.name}, {kind}: {told}")
    for name, values in ratios.items():
        if values:
            label = f"throughput_{name.replace('-', '_')}"
            result.ratios[label] = geometric(values)
            result.spread[f"ratios.{label}"] = (min(values), max(values))
    for kind in ("", "_float"):
        spot = [
            value for name, values in ratios.items() if name.endswith(f"_stepped{kind}") for value in values
        ]
        # What is published is "up to": the largest of all cases.
        result.ratios[f"throughput_largest{kind}"] = max(
            number(row[name])
            for row in result.rows
            for name in (f"ratio{kind}", f"stepped_ratio{kind}")
            if name in row
        )
        result.ratios[f"throughput_traces{kind}"] = geometric(spot)
        result.spread[f"ratios.throughput_traces{kind}"] = (min(spot), max(spot))
    return timelines


def step_by_step(part: FaultTrace, model: Model, lengths: Sequence[Lengths]) -> dict[str, list[Outcome]]:
    """By system, its groups."""
    seconds = part.seconds
    return {
        "ours": [Ours(model, lengths, group, seconds).run() for group in part.groups],
        "float": [Ours(model, lengths, group, seconds, exact=False).run() for group in part.groups],
        "standard": [standard(model, lengths, group, seconds) for group in part.groups],
    }
