"""OpenVINO GenAI: its continuous batching pipeline, stepped by us, keys and values in the model's own precision."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

from bench.peers.openvino_ir import convert
from bench.peers.protocol import Answer, Generate, Setup, serve

STEP_TOKENS_MAX = 2048
BLOCK = 32  # tokens; the CPU plugin's own
TYPES = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


def load(setup: Setup) -> Generate:
    files = Path(setup.scratch) / "openvino"
    if not files.exists():
        convert(Path(setup.model), files)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = setup.batch_max * -(-setup.context_max // BLOCK) + 8
    scheduler.max_num_batched_tokens = STEP_TOKENS_MAX
    scheduler.max_num_seqs = setup.batch_max
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    kind = TYPES[setup.dtype]
    pipeline = genai.ContinuousBatchingPipeline(
        str(files),
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": kind,
            "INFERENCE_NUM_THREADS": setup.threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    asked = 0

    def generate(prompts: list[list[int]], tokens: int) -> Answer:
        nonlocal asked
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        started = time.perf_counter()
        handles = []
        for prompt in prompts:
            asked += 1
            handles.append(pipeline.add_request(asked, ov.Tensor(np.array([prompt], np.int64)), config))
        answer = Answer([[] for _ in prompts], [[] for _ in prompts])
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - started
            for row, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        answer.tokens[row].extend(output.generated_ids)
                        answer.times[row].extend([now] * len(output.generated_ids))
        return answer

    return generate


if __name__ == "__main__":
    serve(load, ("openvino-genai", "openvino"))
