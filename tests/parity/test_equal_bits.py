"""A token's logits have the same bits in prefill, in decode, alone, in any batch, over any number of stages."""

import numpy as np
import numpy.typing as npt
import pytest

from kernels.cpu import _native
from tests.parity.chain import Chain
from tests.parity.conftest import Build

TEXTS = [np.random.default_rng(s).integers(0, 200, 70).tolist() for s in range(9)]
NAMES = [
    "llama", "llama_linear_rope_biases", "mistral_window", "qwen2_mixed_windows", "qwen3_seven_to_one", "phi3_longrope",
    "qwen3_moe", "gemma3",
]  # fmt: skip


def whole(chain: Chain, text: list[int]) -> npt.NDArray[np.float32]:
    row = chain.new()
    out = chain.step([(row, text)])[row]
    chain.release(row)
    return out


def in_chunks(chain: Chain, text: list[int], sizes: list[int]) -> npt.NDArray[np.float32]:
    row = chain.new()
    parts, at = [], 0
    for size in sizes:
        parts.append(chain.step([(row, text[at : at + size])])[row])
        at += size
    chain.release(row)
    assert at == len(text)
    return np.concatenate(parts)


def in_batch(chain: Chain, rng: np.random.Generator) -> list[npt.NDArray[np.float32]]:
    """All texts at once; each step a random subset of them with random counts, in random order."""
    rows = [chain.new() for _ in TEXTS]
    done, parts = [0] * len(TEXTS), [[] for _ in TEXTS]
    while min(done) < len(TEXTS[0]):
        open_ = [i for i, d in enumerate(done) if d < len(TEXTS[i])]
        picked = rng.permutation(open_)[: rng.integers(1, len(open_) + 1)]
        counts = {int(i): int(rng.choice([1, 1, 1, 2, 5, 19])) for i in picked}
        out = chain.step([(rows[i], TEXTS[i][done[i] : done[i] + n]) for i, n in counts.items()])
        for i, n in counts.items():
            parts[i].append(out[rows[i]])
            done[i] = min(done[i] + n, len(TEXTS[i]))
    for row in rows:
        chain.release(row)
    return [np.concatenate(p) for p in parts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_any_chunk_and_batch(build: Build, name: str, dtype: str) -> None:
    chain = Chain(build(name), 1, dtype)
    want = [whole(chain, text) for text in TEXTS]
    assert len({w.tobytes() for w in want}) == len(TEXTS)
    for sizes in ([1] * 70, [3] * 23 + [1], [16, 17, 1, 36], [69, 1]):
        assert np.array_equal(in_chunks(chain, TEXTS[0], sizes), want[0]), sizes
    for seed in range(3):
        got = in_batch(chain, np.random.default_rng(seed))
        assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True)), seed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_stages_and_threads_and_block_size(build: Build, dtype: str) -> None:
    want = whole(Chain(build("qwen3_head_dim"), 1, dtype), TEXTS[0])
    for stages, size, threads in ((2, 16, 1), (3, 32, 2), (4, 4, 1), (1, 24, 3)):
        chain = Chain(build("qwen3_head_dim"), stages, dtype, block_size=size, threads=threads)
        assert np.array_equal(in_chunks(chain, TEXTS[0], [33, 1, 36]), want), (stages, size)


@pytest.mark.parametrize("name", ["phi3", "gemma3"])
def test_eight_bits_however_it_is_cut(build: Build, name: str) -> None:
    want = whole(Chain(build(name), 1, "bfloat16", weights="int8"), TEXTS[0])
    chain = Chain(build(name), 3, "bfloat16", weights="int8", threads=2)
    assert np.array_equal(in_chunks(chain, TEXTS[0], [33, 1, 36]), want)
    assert not np.array_equal(whole(Chain(build(name), 1, "bfloat16"), TEXTS[0]), want)


def test_recomputing_writes_the_same_kv(build: Build) -> None:
    """What a recovery relies on: a position written again, in another chunk, has the same bytes."""
    chain = Chain(build("llama"), 2)
    row = chain.new()
    chain.step([(row, TEXTS[0])])
    before = [[bytes(s.kv.view(b)) for b in t.blocks(row)] for s, t in zip(chain.stages, chain.tables)]  # noqa: B905
    chain.lengths[row] = 37
    chain.step([(row, TEXTS[0][37:50])])
    chain.step([(row, TEXTS[0][50:])])
    after = [[bytes(s.kv.view(b)) for b in t.blocks(row)] for s, t in zip(chain.stages, chain.tables)]  # noqa: B905
    assert before == after


def test_stale_memory_is_never_read(build: Build) -> None:
    """Blocks are not cleared when they change hands: garbage beyond a row's own keys must not matter."""
    clean, dirty = Chain(build("mistral_window"), 1), Chain(build("mistral_window"), 1)
    for block in range(dirty.stages[0].kv.num_blocks):
        dirty.stages[0].kv.write(block, b"\xff" * dirty.stages[0].kv.block_bytes)  # NaN everywhere
    for sizes in ([70], [1] * 70, [33, 37]):
        assert np.array_equal(in_chunks(dirty, TEXTS[0], sizes), in_chunks(clean, TEXTS[0], sizes))


@pytest.mark.parametrize("name", ["llama", "phi3_longrope", "gemma3"])
def test_any_instruction_set(build: Build, name: str) -> None:
    """Nodes with other processors compute the same bits."""
    outs, sets = [], []
    try:
        for isa in (0, 1, 2, 3):
            sets.append(_native.set_isa(isa))
            outs.append([whole(Chain(build(name), 1, d), TEXTS[0]) for d in ("float32", "bfloat16")])
    finally:
        _native.set_isa(-1)
    assert sets[0] == 0
    for other in outs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outs[0], other, strict=True))
