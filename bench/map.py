"""The measured map: every engine on this machine at the same work, in rounds, so that a drift of the machine hits all.

All have the same model and threads, prompts of the same token ids (never twice, so that nothing is cached), greedy
choice, and the same number of tokens whatever they are. A peer has the precision that is the fastest for it here
(settings: peer_precisions).
*Decode* counts the tokens from the moment that every stream has its first until the first of them ends: all decode
together all that time. *Prefill* is prompt tokens over the time until the last stream has its first token.
The machine must be otherwise idle ("load_1m_at_start" tells): engines whose threads wait for each other busily lose far
more to a neighbour than the share that it takes.
Names of metrics: those of model S, bfloat16, context 256 stand alone; others say model, dtype and context.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from bench import mixed
from bench.contract import Result, progress
from bench.limits import matrix_rate, our_matrix_rate, read_bandwidth
from bench.models import MODELS, Dtype, checkpoint, weight_bytes
from bench.peers.client import PEERS, PeerAbsent
from bench.peers.protocol import Answer, Setup
from bench.systems import OURS, QUANTISED, OurSystem, System, started

BATCHES = (1, 8, 32)
PROMPT = 512  # of prefill
THREADS = 2
STEP_TOKENS = 512  # the smallest step of prefill that an engine here makes
SHARED_STEPS = 64  # decode steps, at least, that all streams of a batch have in common
SETTLE_S = 0.3  # compute threads of some engines go on spinning that long after an answer
IDLE_S = 2.0
QUICK_LIMIT_S = 250.0  # no round begins that would end later
# Half a minute for one batch: three rounds of all others are worth more to --quick.
SLOW = ("transformers_cb",)

Rates = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: what is asked of every system."""

    kind: Literal["decode", "prefill"]
    batch: int
    context: int  # prompt tokens

    @property
    def tokens(self) -> int:
        # The first stream of a batch decodes while the last is still in its prompt.
        return 1 if self.kind == "prefill" else SHARED_STEPS + self.batch * self.context // STEP_TOKENS

    @property
    def repeats(self) -> int:
        """Times a round: a prefill is over in a fraction of a second, and a single one says little."""
        return 7 if self.kind == "prefill" else 1

    def rate(self, answer: Answer) -> float:
        """Tokens per second."""
        begun = max(times[0] for times in answer.times)
        if self.kind == "prefill":
            return self.batch * self.context / begun
        ended = min(times[-1] for times in answer.times)
        return sum(begun < at <= ended for times in answer.times for at in times) / (ended - begun)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call of a bench measures."""

    name: str
    cases: tuple[Case, ...]
    models: tuple[tuple[str, Dtype], ...]
    rounds: int
    quick: bool
    device: str = "cpu"
    only: frozenset[str] = frozenset()  # systems; empty: all
    mixed: bool = False  # the time between tokens while others' prompts come, too (mixed.py)

    def wanted(self, system: str) -> bool:
        return system in self.only if self.only else not (self.quick and system in SLOW)


def run(plan: Plan) -> Result:
    """Measure all of it. Exits when a system is asked for that does not exist."""
    there = [*OURS, *(kind.name for kind in PEERS)]
    if unknown := plan.only.difference(there):
        raise SystemExit(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    result = Result(
        plan.name,
        settings={
            "threads": THREADS,
            "device": plan.device,
            "load_1m_at_start": round(os.getloadavg()[0], 2),
            "rounds_max": plan.rounds,
            "cases": [f"{c.kind} b{c.batch} context {c.context}: {c.tokens} tokens" for c in plan.cases],
            "models": [f"{name} {dtype}" for name, dtype in plan.models],
            "quick": plan.quick,
        },
    )
    if plan.device == "cuda" and not torch.cuda.is_available():
        result.absent["cuda"] = "torch sees no CUDA device here: nothing was measured"
        return result
    if plan.quick and not plan.only:
        result.absent.update(dict.fromkeys(SLOW, "left out of --quick for time"))
    begun = time.monotonic()
    for model, dtype in plan.models:
        _measure_model(plan, model, dtype, result, begun)
    return result


def _measure_model(plan: Plan, model: str, dtype: Dtype, result: Result, begun: float) -> None:
    path = checkpoint(model, dtype)
    setup = Setup(
        model=str(path),
        dtype=dtype,
        threads=THREADS,
        batch_max=max(case.batch for case in plan.cases),
        context_max=max(case.context + case.tokens for case in plan.cases) + 1,
        scratch="",
        device=plan.device,
    )
    label = f"_{model}_{dtype}" if (model, dtype) != ("S", "bfloat16") else ""
    absent: dict[str, str] = {}
    tried: dict[str, dict[str, float | str]] = {}
    with started(setup, plan.wanted, absent, _precisions(plan, model, dtype), tried) as systems:
        rates, agreement = _rounds(plan, systems, MODELS[model].vocab_size, absent, begun)
        for name, system in systems.items():
            into = "metrics" if name in OURS else "baseline"
            getattr(result, into)[f"{name}_load_s{label}"] = system.load_s
            getattr(result, into)[f"{name}_peak_bytes{label}"] = system.peak_bytes
            if isinstance(system, OurSystem):
                result.metrics[f"{name}_idle_cpu_share{label}"] = system.idle_cpu_share(IDLE_S)
                if plan.mixed and name not in QUANTISED:
                    _measure_mixed(result, name, system, MODELS[model].vocab_size, label)
    result.absent.update({f"{name}{label}": reason for name, reason in absent.items()})
    result.settings[f"peer_precisions{label}"] = tried  # seconds of a probe, the fastest was measured
    if dtype == "float32":  # in bfloat16 random weights amplify roundings until engines say different things
        result.baseline.update(
            {f"{name}_same_first_token{label}": share for name, share in agreement.items()}
        )
    for case in plan.cases:
        _record(result, case, rates, label)
    _limits(result, plan.device, dtype, weight_bytes(path), label)


def _precisions(plan: Plan, model: str, dtype: Dtype) -> dict[str, str]:
    """Checkpoints that a peer may choose from: of bfloat16 weights also the float32 ones, since what is fastest differs
    from engine to engine and from processor to processor. Who asks for float32 gets no less."""
    kinds: tuple[Dtype, ...] = (
        (dtype, "float32") if dtype == "bfloat16" and plan.device == "cpu" else (dtype,)
    )
    return {kind: str(checkpoint(model, kind)) for kind in kinds}


def _rounds(
    plan: Plan, systems: Mapping[str, System], vocab: int, absent: dict[str, str], begun: float
) -> tuple[dict[Case, Rates], dict[str, float]]:
    """All cases on all systems, again and again; who fails is out from then on. Returns rates by case and system,
    and the share of streams whose first token was that of our node."""
    numbers = random.Random(7)
    rates: dict[Case, Rates] = {case: {} for case in plan.cases}
    firsts: dict[str, list[bool]] = {}
    alive = list(systems)
    longest_s = 0.0
    turns = itertools.count()
    for number in range(plan.rounds):
        if plan.quick and number and time.monotonic() - begun + longest_s > QUICK_LIMIT_S:
            break
        round_begun = time.monotonic()
        for case in (each for each in plan.cases for _ in range(each.repeats)):
            prompts = [[numbers.randrange(3, vocab) for _ in range(case.context)] for _ in range(case.batch)]
            reference: list[int] | None = None
            # Another one begins each time: who comes first finds a cooler machine.
            first = next(turns) % len(alive)
            for name in alive[first:] + alive[:first]:
                system = systems[name]
                try:
                    if case.kind == "decode" and isinstance(system, OurSystem):
                        # Prompts of ours take turns with decodes: the first streams would end before the last one has
                        # begun. So all prompts are known before their streams are timed, which count decodes alone.
                        system.generate(prompts, 1)
                    answer = system.generate(prompts, case.tokens)
                except PeerAbsent as error:
                    absent[name] = str(error)
                    alive = [other for other in alive if other != name]
                    continue
                rates[case].setdefault(name, []).append(case.rate(answer))
                chosen = [stream[0] for stream in answer.tokens]
                reference = reference or chosen
                firsts.setdefault(name, []).extend(a == b for a, b in zip(chosen, reference, strict=True))
                time.sleep(SETTLE_S)
            progress(
                f"  round {number + 1}: {case.kind} b{case.batch} c{case.context}: {_latest(rates[case])}"
            )
        longest_s = max(longest_s, time.monotonic() - round_begun)
    return rates, {name: sum(same) / len(same) for name, same in firsts.items()}


def _measure_mixed(result: Result, name: str, system: OurSystem, vocab: int, label: str) -> None:
    gaps = mixed.measure([system.front], vocab)
    p50, p99 = gaps.quantile(0.5), gaps.quantile(0.99)
    progress(f"  {name}: {p50:.3f} s between tokens under mixed load, p99 {p99:.3f} s")
    for what, value in (("p50_s", p50), ("p99_s", p99), ("p99_over_p50", p99 / p50)):
        result.metrics[f"{name}_inter_token_mixed_{what}{label}"] = value


def _latest(rates: Rates) -> str:
    return ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())


def _record(result: Result, case: Case, rates: Mapping[Case, Rates], label: str) -> None:
    where = label + ("" if case.context in (256, PROMPT) else f"_c{case.context}")
    mixed = result.bench == "decode" and case.kind == "prefill"  # acceptance reads it from there, too
    prefix = "prefill_" if mixed else ""
    for name, measured in rates[case].items():
        into = "metrics" if name in OURS else "baseline"
        values = [value for value in measured if value > 0]
        if not values:
            result.absent[f"{name}_{case.kind}_b{case.batch}{where}"] = "its streams never decoded together"
            continue
        result.measure(f"{name}_{prefix}tokens_per_s_b{case.batch}{where}", values, into)
    ratios = [] if mixed else [f"b{case.batch}"]
    if case.kind == "prefill" and case.batch == 1:
        ratios.append("prefill")
    ours = rates[case].get("node", [])
    for name, values in rates[case].items():
        if name == "node" or not ours:
            continue
        # Round by round, since those of a round met the machine in the same mood.
        if name in OURS:
            name, pairs = f"{name}_node", zip(values, ours, strict=False)
        else:
            pairs = zip(ours, values, strict=False)
        pairwise = [a / b for a, b in pairs if a > 0 and b > 0]
        for ratio in ratios if pairwise else ():
            result.measure(f"{ratio}_{name}{where}", pairwise, "ratios")


def _limits(result: Result, device: str, dtype: Dtype, weights: int, label: str) -> None:
    """The machine's limits and our share of them."""
    metrics = result.metrics
    for threads in (1, THREADS) if device == "cpu" else (1,):
        bandwidth = metrics[f"limit_read_bytes_per_s_t{threads}{label}"] = read_bandwidth(
            threads, weights, device
        )
        rate = metrics[f"limit_matrix_flops_t{threads}{label}"] = matrix_rate(threads, dtype, device)
        if device == "cpu":
            metrics[f"our_matrix_flops_t{threads}{label}"] = our_matrix_rate(threads, dtype)
    # A step of one stream reads every weight; a prompt's token takes two operations for each.
    per_value = 4 if dtype == "float32" else 2
    metrics[f"limit_b1_tokens_per_s{label}"] = bandwidth / weights
    metrics[f"limit_prefill_tokens_per_s{label}"] = rate / (2 * weights / per_value)
    b1 = metrics.get(f"node_tokens_per_s_b1{label}") if result.bench == "decode" else None
    if b1 is not None:
        metrics[f"share_of_limit{label}"] = b1 * weights / bandwidth


def every_model(quick: bool) -> tuple[tuple[str, Dtype], ...]:
    """Model S in bfloat16; and all others unless it has to be quick."""
    main: tuple[tuple[str, Dtype], ...] = (("S", "bfloat16"),)
    return main if quick else (*main, ("S", "float32"), ("T", "bfloat16"), ("T", "float32"))
