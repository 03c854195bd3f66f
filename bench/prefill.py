"""Prefill rate of prompts of 512 tokens, one and several at once; the same systems as in decode.py (see map.py)."""

from __future__ import annotations

from bench import map as measured
from bench.contract import Result
from bench.map import BATCHES, PROMPT, Case, Plan, every_model

OPTIONS = ("device", "only")


def run(quick: bool, device: str = "cpu", only: frozenset[str] = frozenset()) -> Result:
    plan = Plan(
        name="prefill",
        cases=tuple(Case("prefill", batch, PROMPT) for batch in BATCHES),
        models=every_model(quick),
        rounds=7,
        quick=quick,
        device=device,
        only=only,
    )
    return measured.run(plan)
