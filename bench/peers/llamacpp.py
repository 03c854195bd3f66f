"""llama.cpp through its own C interface: one context, one sequence for each stream, one `llama_batch` a step."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import llama_cpp as llama
import numpy as np

from bench.peers.gguf import convert
from bench.peers.protocol import Answer, Generate, Setup, serve

STEP_TOKENS_MAX = 2048
PHYSICAL_TOKENS_MAX = 512  # llama.cpp's default: more was not faster
GGML_TYPES = {"float32": 0, "bfloat16": 30}


class _Context:
    """The model and a context in which every sequence has room for itself."""

    def __init__(self, setup: Setup) -> None:
        model_file = Path(setup.scratch) / "model.gguf"
        if not model_file.exists():
            convert(Path(setup.model), model_file)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            os.fsencode(model_file), llama.llama_model_default_params()
        )
        params = llama.llama_context_default_params()
        params.n_seq_max = setup.batch_max
        params.n_ctx = setup.batch_max * -(-setup.context_max // 256) * 256
        params.n_batch = STEP_TOKENS_MAX
        params.n_ubatch = PHYSICAL_TOKENS_MAX
        params.n_threads = params.n_threads_batch = setup.threads
        params.type_k = params.type_v = GGML_TYPES[setup.dtype]
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise RuntimeError("llama.cpp could not load the model")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(STEP_TOKENS_MAX, 0, 1)

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """One step of rows (token, position, sequence, wants logits); the likeliest token of those that want."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        chosen = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = ctypes.cast(
                    llama.llama_get_logits_ith(self.context, i),
                    ctypes.POINTER(ctypes.c_float * self.vocab_size),
                ).contents
                chosen.append(int(np.frombuffer(logits, np.float32).argmax()))
        return chosen


def load(setup: Setup) -> Generate:
    context = _Context(setup)

    def generate(prompts: list[list[int]], tokens: int) -> Answer:
        started = time.perf_counter()
        context.clear()
        answer = Answer([[] for _ in prompts], [[] for _ in prompts])

        def take(sequences: list[int], chosen: list[int]) -> None:
            now = time.perf_counter() - started
            for sequence, token in zip(sequences, chosen, strict=True):
                answer.times[sequence].append(now)
                answer.tokens[sequence].append(token)

        waiting = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(waiting), STEP_TOKENS_MAX):
            rows = waiting[first : first + STEP_TOKENS_MAX]
            take([row[2] for row in rows if row[3]], context.decode(rows))
        everyone = list(range(len(prompts)))
        for step in range(tokens - 1):
            rows = [(answer.tokens[s][-1], len(prompts[s]) + step, s, True) for s in everyone]
            take(everyone, context.decode(rows))
        return answer

    return generate


if __name__ == "__main__":
    serve(load, ("llama-cpp-python",))
