"""Decode rate: our node, our 4-stage pipeline, our node with quantised weights, and the engines that a user would run
without us (see map.py)."""

from __future__ import annotations

from bench import map as measured
from bench import quantised, ranks, sampling
from bench.contract import Result
from bench.map import BATCHES, PROMPT, Case, Plan, every_model

OPTIONS = ("device", "only")


def run(quick: bool, device: str = "cpu", only: frozenset[str] = frozenset()) -> Result:
    contexts = (256,) if quick else (256, 2048)
    decodes = tuple(Case("decode", batch, context) for context in contexts for batch in BATCHES)
    plan = Plan(
        name="decode",
        cases=(Case("prefill", 1, PROMPT), *decodes),
        models=every_model(quick),
        rounds=5,
        quick=quick,
        device=device,
        only=only,
        mixed=True,
    )
    result = measured.run(plan)
    if device == "cpu" and (not only or "node" in only):
        sampling.measure(result)
        quantised.measure(result)
        ranks.measure(result)
    return result
