"""What `bench kevlarflow` compares streams with, and the load that it offers."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest

from bench.kevlarflow_check import compare, expected_tokens
from bench.kevlarflow_load import OUTPUT_MEAN, PROMPT_MEAN, Outcome, Request, read, workload
from controlplane.contract.requests import Sampling
from dataplane._fast.blocktable import BlockTable
from dataplane.core.messages import Block, Fence, KvMeta, StepMeta
from dataplane.demo import model_dir
from dataplane.devices import A10_LLAMA_8B_QUARTER, PROFILES, message_bytes
from dataplane.model.config import load_config
from dataplane.model.sampler import SamplingTable
from dataplane.oracle import OracleExecutor
from dataplane.transport import frames

STAGES, VOCABULARY = 4, 2048
REQUESTS = [
    Request(0.0, (5, 6, 7), 4, 11),
    Request(0.0, tuple(range(20, 60)), 30, 12),
    Request(0.0, (9,), 1, 13),
]


def served(request: Request) -> list[int]:
    """The tokens as nodes compute them: through blocks, the prompt in two chunks."""
    stages = [
        OracleExecutor(
            load_config(model_dir()), s, STAGES, num_blocks=32, block_size=4, profile=PROFILES["instant"]
        )
        for s in range(STAGES)
    ]
    table = BlockTable(1, 32, 4)
    table.extend(table.new_row(), list(np.random.default_rng(3).permutation(32)))
    sampler = SamplingTable(1, VOCABULARY)
    slot = np.array([sampler.admit(Sampling(request.max_tokens, request.seed), request.prompt)], np.int32)
    ids = list(request.prompt)
    done = len(ids) // 2
    for start, end in ((0, done), (done, len(ids))):
        if start < end:
            logits = _step(stages, table, ids[start:end], start)
    while True:
        drawn = sampler.sample(logits, slot).tokens
        sampler.append_many(slot, drawn)
        ids += drawn.tolist()
        if len(ids) == len(request.prompt) + request.max_tokens:
            return ids[len(request.prompt) :]
        logits = _step(stages, table, ids[-1:], len(ids) - 1)


def _step(stages: list[OracleExecutor], table: BlockTable, tokens: list[int], start: int) -> np.ndarray:
    row = np.zeros(1, np.int32)
    arrays = table.fill(row, row + start, row + len(tokens))
    hidden = None
    for stage in stages:
        given = np.array(tokens) if stage.is_first else None
        hidden = stage.forward(given, hidden, arrays, np.array([len(tokens) - 1], np.int32)).data
    return np.array(hidden)


def test_expected_tokens_are_those_that_stages_compute() -> None:
    assert expected_tokens(REQUESTS, STAGES, VOCABULARY) == [served(request) for request in REQUESTS]


def test_tokens_lost_doubled_and_changed_are_counted() -> None:
    outcomes = [
        Outcome(r, tokens=t) for r, t in zip(REQUESTS, expected_tokens(REQUESTS, 4, 2048), strict=True)
    ]
    sound = compare(outcomes, STAGES, VOCABULARY)
    assert (sound.lost, sound.duplicated, sound.different, sound.failed) == (0, 0, 0, 0)
    del outcomes[0].tokens[2]
    outcomes[1].tokens[7] ^= 1
    outcomes[2].error = "gone"
    worse = compare(outcomes, STAGES, VOCABULARY)
    assert (worse.lost, worse.duplicated, worse.different, worse.failed) == (1, 0, 2, 1)


def test_the_load_is_poisson_with_the_lengths_that_are_stated() -> None:
    requests = workload(5.0, 2000.0)
    assert requests == workload(5.0, 2000.0)
    assert len(requests) / 2000.0 == pytest.approx(5.0, rel=0.05)
    gaps = np.diff([r.at_s for r in requests])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert statistics.fmean(r.max_tokens for r in requests) == pytest.approx(OUTPUT_MEAN, rel=0.03)
    assert statistics.fmean(len(r.prompt) for r in requests) == pytest.approx(PROMPT_MEAN, rel=0.05)


def test_an_answer_that_comes_in_pieces_is_read_with_its_times() -> None:
    def event(*ids: int) -> bytes:
        text = b"data: " + json.dumps({"choices": [{"text": "x", "token_ids": ids}]}).encode() + b"\n\n"
        return b"%x\r\n%s\r\n" % (len(text), text)

    whole = (
        b"HTTP/1.1 200 OK\r\nserver: x\r\n\r\n"
        + event(1, 2)
        + event(3)
        + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    )
    for cut in range(1, len(whole)):
        outcome = Outcome(REQUESTS[0])
        read([(1.0, whole[:cut]), (2.0, whole[cut:])], outcome)
        assert outcome.tokens == [1, 2, 3]
        assert not outcome.error
        assert outcome.times == sorted(outcome.times)
    cut_off = Outcome(REQUESTS[0])
    read([(1.0, whole[: whole.index(b"e\r\ndata: [DONE]")])], cut_off)
    assert "without [DONE]" in cut_off.error
    refused = Outcome(REQUESTS[0])
    read([(1.0, b'HTTP/1.1 503 x\r\n\r\n{"error": {"message": "no"}}')], refused)
    assert refused.error.startswith("HTTP 503")


def test_messages_weigh_what_the_profile_says() -> None:
    weigh = message_bytes(A10_LLAMA_8B_QUARTER, 8)
    step = frames.encode(StepMeta("p", Fence(1), 1, b""), bytes(8 * 10))
    copy = frames.encode(KvMeta("p", Fence(1), (Block(1, 0, 16, 0),)), bytes(8 * 16))
    assert weigh(step) == len(step[0]) + 10 * 8192
    assert weigh(copy) == len(copy[0]) + 16 * 32_768
    assert weigh([b"hello"]) == 5
