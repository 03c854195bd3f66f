"""transformers: `generate`, the whole batch at once, with the fastest attention that it brings itself (sdpa)."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from bench.peers.protocol import Answer, Generate, Setup, serve


class _Clock(StoppingCriteria):
    """Called after every step: notes the time, never stops anything."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.started)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load_model(setup: Setup, attention: str) -> Any:
    """The model in evaluation mode, ending no stream before its time."""
    torch.set_num_threads(setup.threads)
    model = AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=getattr(torch, setup.dtype), attn_implementation=attention
    ).to(setup.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load(setup: Setup) -> Generate:
    model = load_model(setup, "sdpa")

    def generate(prompts: list[list[int]], tokens: int) -> Answer:
        clock = _Clock()
        ids = torch.tensor(prompts, device=setup.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return Answer([clock.times] * len(prompts), output[:, ids.shape[1] :].tolist())

    return generate


if __name__ == "__main__":
    serve(load, ("transformers", "torch"))
