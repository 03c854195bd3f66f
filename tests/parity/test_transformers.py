"""Greedy output equals transformers' token for token in float32, for every family and odd shape."""

import numpy as np
import pytest
import torch
import transformers

from tests.parity.chain import Chain
from tests.parity.conftest import BASE, MODELS, Build

COUNT = 40


def expected(path, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens one forward at a time, and the logits of the whole text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(COUNT):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        return text[len(prompt) :], model(torch.tensor([text])).logits[0]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 200, n).tolist() for n in (1, 16, 45)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equality(build: Build, name: str) -> None:
    path = build(name)
    want = [expected(path, p)[0] for p in prompts()]
    assert sum(len(set(w)) for w in want) > 8, "a model that repeats itself proves little"
    for stages, chunk in ((1, 1000), (2, 7), (4, 16)):
        assert Chain(path, stages).greedy(prompts(), COUNT, chunk) == want, (stages, chunk)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_close(build: Build, name: str) -> None:
    prompt = prompts()[2]
    text, want = expected(build(name), prompt)
    chain = Chain(build(name), 3)
    row = chain.new()
    got = torch.from_numpy(chain.step([(row, prompt + text)])[row])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_bfloat16_is_near_float32(build: Build) -> None:
    prompt = prompts()[2]
    out = []
    for dtype in ("float32", "bfloat16"):
        chain = Chain(build("llama"), 2, dtype)
        row = chain.new()
        out.append(torch.from_numpy(chain.step([(row, prompt)])[row]))
    assert torch.nn.functional.cosine_similarity(out[0], out[1], dim=-1).min() > 0.99
    assert not torch.equal(out[0], out[1])


def test_base_has_odd_shapes() -> None:
    """The shapes that leave partial vectors must stay in the list: they are where kernels go wrong."""
    assert BASE["hidden_size"] // BASE["num_attention_heads"] % 16
    assert BASE["vocab_size"] % 16
    assert BASE["intermediate_size"] % 16
