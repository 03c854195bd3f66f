"""Load-aware placement of copies and load-aware recovery (LUMEN) against two ways to do without.

`stop-restart`: no copies; what an instance had is computed again, from its beginning, wherever there is room.
`fixed-neighbour`: every request's copy is at the next instance of the ring, and there it goes on.

Without more, on 4 and 8 instances of real processes (lumen_real.py), one of which is killed. `--simulate`: 4 to 1,024
instances of the same policy code in a discrete-event simulation (lumen_sim.py), of which one in eight fails, one after
the other, while they are loaded to `LOAD` of what they can bear.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

from bench.bars import LUMEN_MEASURES, LUMEN_SAVED
from bench.contract import Result, progress
from bench.kevlarflow_load import (
    OUTPUT_MAX,
    OUTPUT_MEAN,
    OUTPUT_SIGMA,
    PROMPT_MAX,
    PROMPT_MEAN,
    PROMPT_SIGMA,
    workload,
)
from bench.lumen_real import measure
from bench.lumen_sim import Device, Request, Simulation
from controlplane.contract.topology import Mode

OPTIONS = ("simulate", "only")
OURS = Mode.LOAD_AWARE
BASELINES = (Mode.STOP_RESTART, Mode.FIXED_NEIGHBOUR)
MEASURES = tuple(f"{name}_s" for name in LUMEN_MEASURES)
LOAD = 0.8  # of the requests per second that all instances together bear
SIZES, SIZES_REAL, SEEDS = (4, 8, 64, 1024), (4, 8), (1, 2, 3)
WINDOW_S, WINDOW_LARGE_S = 120.0, 30.0  # of arrivals
FAIL_AT_S, RELOAD_S = 15.0, 60.0
FAILURES_S = 20.0  # within which all failures come, while requests do


def run(quick: bool, simulate: bool = False, only: frozenset[str] = frozenset()) -> Result:
    """`only`: these numbers of instances."""
    possible = SIZES if simulate else SIZES_REAL
    sizes = [size for size in possible if not only or str(size) in only]
    if not sizes:
        sys.exit(f"--only: {', '.join(sorted(only))} is none of {', '.join(map(str, possible))}")
    result = Result("lumen", settings=_settings(quick) if simulate else {"simulated": False, "quick": quick})
    for size in sizes:
        seeds = SEEDS[:1] if quick or size > 64 else SEEDS
        if simulate:
            _compare(size, seeds, _once, result)
        else:
            _compare(size, seeds, partial(_real, quick), result)
    return result


def _real(quick: bool, size: int, mode: Mode, seed: int) -> dict[str, float]:
    return measure(size, mode, quick, seed)


def _settings(quick: bool) -> dict[str, object]:
    return {
        "simulated": True,
        "load": LOAD,
        "rate_per_instance": round(_rate(), 3),
        "arrivals_s": WINDOW_S,
        "arrivals_large_s": WINDOW_LARGE_S,
        "fail_at_s": FAIL_AT_S,
        "reload_s": RELOAD_S,
        "prompt_tokens": f"log-normal, mean {PROMPT_MEAN:g}, sigma {PROMPT_SIGMA:g}, at most {PROMPT_MAX}",
        "output_tokens": f"log-normal, mean {OUTPUT_MEAN:g}, sigma {OUTPUT_SIGMA:g}, at most {OUTPUT_MAX}",
        "quick": quick,
    }


def _rate() -> float:
    """Requests per second and instance, at LOAD: with all its places taken a step takes so long, and every token of an
    output one."""
    device = Device()
    context = device.places * (PROMPT_MEAN + OUTPUT_MEAN / 2)
    step_s = device.fixed_s + device.places * device.per_token_s + context * device.per_context_token_s
    return LOAD * device.places / (OUTPUT_MEAN * step_s)


def _compare(
    size: int, seeds: Sequence[int], once: Callable[[int, Mode, int], dict[str, float]], result: Result
) -> None:
    measured: dict[Mode, list[dict[str, float]]] = {}
    for mode in (OURS, *BASELINES):
        measured[mode] = [once(size, mode, seed) for seed in seeds]
        progress(
            f"{size} instances, {mode.value}: "
            + ", ".join(f"{name} {_mean(measured[mode], name):.4g}" for name in measured[mode][0])
        )
    for mode, runs in measured.items():
        into = result.metrics if mode is OURS else result.baseline
        prefix = f"n{size}" if mode is OURS else f"n{size}_{mode.value}"
        for name in runs[0]:
            into[f"{prefix}_{name}"] = _mean(runs, name)
    for mode in BASELINES:
        for index, name in enumerate(MEASURES):
            ours, theirs = _mean(measured[OURS], name), _mean(measured[mode], name)
            key = f"n{size}_{name.removesuffix('_s')}_{mode.value}"
            result.ratios[key] = theirs / ours
            published = LUMEN_SAVED.get((size, mode))
            if published is not None:
                saved, theirs_saved = 1.0 - ours / theirs, published[index]
                verdict = "at least as much" if saved >= theirs_saved else "LESS"
                progress(f"  {key}: {saved:.1%} less, published {theirs_saved:.1%}: {verdict}")


def _once(size: int, mode: Mode, seed: int) -> dict[str, float]:
    large = size > 64
    window_s = WINDOW_LARGE_S if large else WINDOW_S
    requests = [
        Request(index, each.at_s, len(each.prompt), each.max_tokens)
        for index, each in enumerate(workload(_rate() * size, window_s, seed))
    ]
    count = max(1, size // 8)
    within_s = min(FAILURES_S, window_s - FAIL_AT_S)
    failures = [(FAIL_AT_S + within_s * k / count, (8 * k + 3) % size) for k in range(count)]
    simulation = Simulation(mode, size, requests, failures, RELOAD_S)
    simulation.run()
    interrupted = {request.rid for request in simulation.interrupted}
    others = [request for request in requests if request.rid not in interrupted]
    return {
        "ttft_mean_s": statistics.fmean(request.first_at - request.at for request in requests),
        "tpot_mean_s": statistics.fmean(map(_tpot_s, requests)),
        "recovery_mean_s": statistics.fmean(request.paused_s for request in simulation.interrupted),
        "others_ttft_mean_s": statistics.fmean(request.first_at - request.at for request in others),
        "others_tpot_mean_s": statistics.fmean(map(_tpot_s, others)),
        "interrupted_tpot_mean_s": statistics.fmean(map(_tpot_s, simulation.interrupted)),
        "requests": len(requests),
        "interrupted": len(interrupted),
        "at_holder": simulation.at_holder,
    }


def _tpot_s(request: Request) -> float:
    return (request.last_at - request.first_at) / max(1, request.output - 1)


def _mean(runs: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)
