"""transformers' continuous batching: one manager, its paged attention, streams that come and go."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import time

from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.peers.protocol import Answer, Generate, Setup, serve
from bench.peers.transformers import load_model

STEP_TOKENS_MAX = 2048
PAGE = 32


def load(setup: Setup) -> Generate:
    model = load_model(setup, "paged|sdpa")
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=setup.batch_max * -(-setup.context_max // PAGE) + 8,
        max_batch_tokens=STEP_TOKENS_MAX,
        allow_block_sharing=False,
    )

    def generate(prompts: list[list[int]], tokens: int) -> Answer:
        started = time.perf_counter()
        generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        results = model.generate_batch(
            prompts, generation, continuous_batching_config=config, record_timestamps=True
        ).values()
        if len(results) != len(prompts) or any(r.error is not None for r in results):
            raise RuntimeError(f"continuous batching failed: {[r.error for r in results]}")
        times = [[at - started for at in r.timestamps] for r in results]
        return Answer(times, [list(r.generated_tokens) for r in results])

    return generate


if __name__ == "__main__":
    serve(load, ("transformers", "torch"))
