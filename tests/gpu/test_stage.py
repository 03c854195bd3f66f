"""Whole stages: what a step computes, and that its bits do not depend on how the tokens came."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

from dataplane.executor import StageExecutor
from dataplane.model.config import load_config
from dataplane.model.layers import build_layer, norm_of, stage_spec
from dataplane.model.split import split_layers
from dataplane.model.weights import EMBED, NORM, load_weights, stage_shapes
from kernels.base import DTYPES, Head
from kernels.cuda import graphs
from kernels.cuda.build import BLOCKS_MIN, Room, build
from kernels.cuda.cache import DeviceCache
from kernels.cuda.memory import CONTEXT_BYTES, DeviceMemory
from kernels.cuda.stage import CudaStage
from kernels.cuda.weights import DeviceWeights
from kernels.dispatch import CacheShape
from tests.gpu.steps import Rows

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 71, "hidden_size": 48, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "attention_bias": True, "use_sliding_window": True, "sliding_window": 19,
    "max_window_layers": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with all that the kernels support: head norms, biases, grouped heads, a window."""
    path = tmp_path_factory.mktemp("model")
    write_model(path, CONFIG)
    return path


FAMILIES: dict[str, dict[str, Any]] = {
    "mixture": {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 5, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "mlp_only_layers": [0], "sliding_window": None, "use_sliding_window": False,
    },
    "gemma": {
        "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2, "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 20, "sliding_window": 9,
    },
    "phi": {
        "architectures": ["Phi3ForCausalLM"], "head_dim": 16, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2, 3, 4, 5]},
        "partial_rotary_factor": 0.75,
    },
}  # fmt: skip


def write_model(path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    shapes = stage_shapes(load_config(path), range(config["num_hidden_layers"]))
    weights = {
        name: torch.randn(*shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(weights, path / "model.safetensors")


class Pipeline:
    """The stages of the model on the device, each with its own cache, and one table of sequences."""

    def __init__(
        self, model_dir: Path, stages: int, dtype: Any, device: torch.device, rows_max: int = 128
    ) -> None:
        config, kind = load_config(model_dir), DTYPES[dtype]
        weights = load_weights(model_dir, config, range(config.num_layers))
        embed = weights[EMBED].to(kind)
        head = Head(norm_of(config, weights[NORM]), weights[EMBED].to(kind), config.logit_softcap)
        self.stages: list[CudaStage] = []
        for number, layers in enumerate(split_layers(config.num_layers, stages)):
            kv = DeviceCache(24, len(layers), config.num_kv_heads, 16, config.head_dim, dtype, str(device))
            built = tuple(build_layer(config, i, weights, kind) for i in layers)
            ends = (embed if number == 0 else None, head if number == stages - 1 else None)
            self.stages.append(CudaStage(stage_spec(config, built, *ends), kv, rows_max))
        self.rows = Rows([100, 60, 60], kv)

    def step(self, *work: tuple[int, int, list[int]]) -> np.ndarray:
        """Logits of every token of (sequence, first position, tokens)."""
        arrays = self.rows.step(*((i, start, len(tokens)) for i, start, tokens in work))
        values = np.array([t for _, _, ts in work for t in ts])
        every = np.arange(len(values), dtype=np.int32)
        for stage in self.stages:
            values = stage.forward(values, arrays, every)
        return values


def tokens_of(count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, CONFIG["vocab_size"], count).tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.6)])
def test_logits_are_those_of_the_cpu(device, model_dir, dtype, tolerance) -> None:
    tokens = tokens_of(30)
    pipeline = Pipeline(model_dir, 1, dtype, device)
    got = pipeline.step((0, 0, tokens))
    cpu = StageExecutor(model_dir, 0, 1, num_blocks=24, dtype=dtype)
    step = pipeline.rows.step((0, 0, 30))
    want = cpu.forward(np.array(tokens), None, step, np.arange(30, dtype=np.int32))
    assert want.std() > 1
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.timeout(600)  # the interpreter takes its time on a busy machine
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_those_of_the_cpu(device, tmp_path, name) -> None:
    """And a token that is decoded has the bits of one in a prefill, here in two stages."""
    write_model(tmp_path, CONFIG | FAMILIES[name])
    tokens = tokens_of(14)
    pipeline = Pipeline(tmp_path, 2, "float32", device)
    got = pipeline.step((0, 0, tokens))
    cpu = StageExecutor(tmp_path, 0, 1, num_blocks=24)
    want = cpu.forward(np.array(tokens), None, pipeline.rows.step((0, 0, 14)), np.arange(14, dtype=np.int32))
    assert want.std() > 0.5
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=2e-3)
    pipeline.step((1, 0, tokens[:13]))
    assert np.array_equal(pipeline.step((1, 13, tokens[13:]))[0], got[13])


@pytest.mark.timeout(600)  # the interpreter takes its time on a busy machine
@pytest.mark.parametrize(("dtype", "stages"), [("float32", 1), ("bfloat16", 2)])
def test_bits_do_not_depend_on_the_path(device, model_dir, short_splits, dtype, stages) -> None:
    """A prefill, chunks and decode steps alone and in batches, which on a GPU are graph replays."""
    tokens, other = tokens_of(40), tokens_of(9)
    pipeline = Pipeline(model_dir, stages, dtype, device)
    whole = pipeline.step((1, 0, tokens))
    assert np.isfinite(whole).all()
    assert len({row.tobytes() for row in whole}) == len(whole)  # the rows can tell a mistake

    chunked = np.concatenate([pipeline.step((2, at, tokens[at : at + 17])) for at in range(0, 40, 17)])
    assert np.array_equal(chunked, whole)

    pipeline.step((0, 0, tokens[:20]))
    for at in (20, 21):  # alone: one row
        assert np.array_equal(pipeline.step((0, at, tokens[at : at + 1]))[0], whole[at])
    pipeline.step((1, 0, other))
    # Three rows, padded to four.
    out = pipeline.step((1, 9, [5]), (0, 22, tokens[22:23]), (2, 22, tokens[22:23]))
    assert np.array_equal(out[1], whole[22])
    assert np.array_equal(out[2], whole[22])
    mixed = pipeline.step((1, 10, other), (0, 23, tokens[23:24]))  # a chunk of prefill beside a decode
    assert np.array_equal(mixed[-1], whole[23])


def test_steps_that_do_not_fit_are_refused(device, model_dir) -> None:
    pipeline = Pipeline(model_dir, 1, "float32", device)
    stage, step = pipeline.stages[0], pipeline.rows.step((0, 0, 3))
    tokens, last = np.arange(3), np.array([2], np.int32)
    step.tables[0, 0] = 24
    with pytest.raises(IndexError, match="a block is outside the cache"):
        stage.forward(tokens, step, last)
    step.slots[0] = 24 * 16
    with pytest.raises(IndexError, match="a slot is outside the cache"):
        stage.forward(tokens, step, last)
    with pytest.raises(IndexError, match="a row that this step does not have"):
        stage.forward(tokens, step, last + 1)


def test_an_executor_runs_on_the_gpu(gpu, model_dir) -> None:
    """The data plane's own way to a stage, of two stages, with activations and blocks through host memory."""
    tokens = tokens_of(20)
    want = Pipeline(model_dir, 2, "bfloat16", gpu).step((0, 0, tokens))
    first, last = (
        StageExecutor(model_dir, s, 2, num_blocks=24, dtype="bfloat16", device="cuda") for s in range(2)
    )
    step = Rows([100, 60, 60], first.kv).step((0, 0, 20))
    hidden = first.forward(np.array(tokens), None, step, np.arange(0, dtype=np.int32))
    got = last.forward(None, memoryview(hidden).cast("B"), step, np.arange(20, dtype=np.int32))
    assert np.array_equal(got, want)


class Captures:
    """Counts captures (on a GPU, CUDA graphs) and notes which of them a step replays."""

    def __init__(self, device, monkeypatch) -> None:
        self.made = 0
        self.replays: list[int] = []
        name = "cuda_capture" if device.type == "cuda" else "run_uncaptured"
        real = getattr(graphs, name)

        def capture(body):
            number, self.made = self.made, self.made + 1
            replay = real(body)
            return lambda: (self.replays.append(number), replay())

        monkeypatch.setattr(graphs, name, capture)


def test_decode_steps_are_captured_once(device, model_dir, monkeypatch) -> None:
    """One capture for each power of two of rows."""
    captures = Captures(device, monkeypatch)
    pipeline = Pipeline(model_dir, 1, "float32", device)
    pipeline.step((0, 0, [5, 6]), (1, 0, [7]), (2, 0, [8]))  # a prefill
    assert not captures.made
    for at in (2, 3):
        pipeline.step((0, at, [9]))
    pipeline.step((0, 4, [9]), (1, 1, [9]), (2, 1, [9]))
    pipeline.step((0, 5, [9]))
    assert captures.replays == [0, 0, 1, 0]
    assert captures.made == 2


def test_after_a_warm_up_no_step_captures_or_moves_anything(
    device, model_dir, short_splits, monkeypatch
) -> None:
    """Whatever its shape: also prompts of as many rows as there may be."""
    captures = Captures(device, monkeypatch)
    cold = Pipeline(model_dir, 1, "float32", device, rows_max=70)
    tokens = tokens_of(70)
    want = cold.step((0, 0, tokens))
    captures.made = 0
    pipeline = Pipeline(model_dir, 1, "float32", device, rows_max=70)
    (stage,) = pipeline.stages
    before = stage.kv.planes.clone()
    stage.warm_up()
    assert torch.equal(stage.kv.planes, before), "it runs over padding only"
    shapes = captures.made
    assert shapes == 8 * 3, (
        "rows 1 to 128, and 1, 2 and 4 splits of 128 keys for the 384 positions of the cache"
    )
    address = stage._activations.residual.data_ptr()
    assert np.array_equal(pipeline.step((0, 0, tokens)), want)
    pipeline.step((0, 70, [9]), (1, 0, [7]), (2, 0, [8]))
    assert (captures.made, stage._activations.residual.data_ptr()) == (shapes, address)
    assert len(captures.replays) == 1
    with pytest.raises(ValueError, match="a step of 71 tokens"):
        pipeline.step((0, 0, [*tokens, 1]))


def test_tied_embeddings_are_on_the_device_once(device, model_dir) -> None:
    config = load_config(model_dir)
    weights = load_weights(model_dir, config, range(config.num_layers))
    embed = weights[EMBED].to(torch.bfloat16)
    layers = (build_layer(config, 0, weights, torch.bfloat16),)
    spec = stage_spec(config, layers, embed, Head(weights[NORM], embed))
    there = DeviceWeights.load(spec, device, 64, torch.bfloat16)
    assert there.embed is not None
    assert there.head is not None
    assert there.embed.data_ptr() == there.head.weight.data_ptr()


def test_the_pool_is_what_the_device_has_room_for(device, model_dir, monkeypatch) -> None:
    """Measured with weights and the largest step on it."""
    config = load_config(model_dir)
    weights = load_weights(model_dir, config, range(config.num_layers))
    layers = tuple(build_layer(config, i, weights, torch.float32) for i in range(config.num_layers))
    spec = stage_spec(config, layers, weights[EMBED], None)
    shape = CacheShape(len(layers), config.num_kv_heads, 16, config.head_dim, "float32")
    block = 2 * len(layers) * config.num_kv_heads * 16 * config.head_dim * 4
    rehearsed, captured = [], []
    monkeypatch.setattr(CudaStage, "rehearse", lambda stage: rehearsed.append(stage.kv.num_blocks))
    monkeypatch.setattr(graphs.DecodeGraphs, "capture_all", lambda one: captured.append(weakref.ref(one)))
    total = 4 << 30
    memory = DeviceMemory(total, total - (1 << 30), 100 << 20)
    monkeypatch.setattr(DeviceMemory, "measure", classmethod(lambda cls, device: captured and memory))
    stage = build(spec, shape, device, Room(64, 0, 0.25), "triton")
    assert rehearsed == [BLOCKS_MIN]
    assert [one() for one in captured] == [None], "measured with graphs, whose memory is free again"
    assert stage.kv.num_blocks == (total // 4 - (100 << 20) - CONTEXT_BYTES) // block
    assert build(spec, shape, device, Room(64, 9, 0.25), "triton").kv.num_blocks == 9


def test_a_librarys_attention_is_measured_and_warmed_up_with_it(device, model_dir, monkeypatch) -> None:
    """For every size of decode steps up to the longest context, and the largest chunk of a prompt."""
    warmed = []

    class Library:
        def __init__(self, planes: torch.Tensor) -> None:
            self.blocks = planes.shape[2]

        def warm_up(self, heads: int, _scale: float, rows: list[int], widths: list[int], chunk: int) -> None:
            warmed.append((self.blocks, heads, rows, widths, chunk))

    monkeypatch.setattr("kernels.cuda.stage.PagedAttention", Library)
    monkeypatch.setattr(CudaStage, "rehearse", lambda stage: None)
    memory = DeviceMemory(4 << 30, 4 << 30, 0)
    monkeypatch.setattr(DeviceMemory, "measure", classmethod(lambda cls, device: memory))
    config = load_config(model_dir)
    weights = load_weights(model_dir, config, range(config.num_layers))
    layers = tuple(build_layer(config, i, weights, torch.float32) for i in range(config.num_layers))
    shape = CacheShape(len(layers), config.num_kv_heads, 64, config.head_dim, "float32")
    spec = stage_spec(config, layers, weights[EMBED], None)
    build(spec, shape, device, Room(70, 0, 0.25), "xformers").warm_up()
    sizes = (4, [1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16], 70)
    assert warmed[0] == (BLOCKS_MIN, *sizes), "of all positions, though this cache has 256"
    assert [one[1:] for one in warmed] == [sizes] * 2
