"""GGUF files against the `gguf` package that writes them, and stages that read their blocks."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer

from controlplane.gguf.files import folder_of, small_files
from controlplane.gguf.header import GgufError, read_header
from controlplane.gguf.tokenizer import tokenizer_json
from dataplane.executor import StageExecutor
from dataplane.model.blocks import KERNELS, from_blocks
from dataplane.model.bundle import holds_stage, open_bundle
from dataplane.model.checkpoint import checkpoint_of
from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from dataplane.model.quantised import weight_of
from dataplane.model.weights import SINGLE, load_weights
from kernels.quantised import Quantised
from tests.parity.chain import Chain
from tests.parity.gguf_files import make_checkpoint, write

TEXT = np.random.default_rng(5).integers(0, 200, 40).tolist()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original")
    make_checkpoint(path)
    return path


def logits(chain: Chain) -> npt.NDArray[np.float32]:
    row = chain.new()
    return chain.step([(row, TEXT)])[row]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q4_k"])
def test_blocks_have_the_values_that_the_package_says(kind: str) -> None:
    """Any bytes, as long as the scales are finite."""
    quant = gguf.GGMLQuantizationType[kind.upper()]
    values, size = gguf.GGML_QUANT_SIZES[quant]
    raw = np.random.default_rng(1).integers(0, 256, (9, 6, size), np.uint8)
    halves = 1 if kind in ("q8_0", "q4_0") else 2
    raw[..., 1 : 2 * halves : 2] &= 0x3F
    flat = raw.reshape(9, -1)
    made = from_blocks(kind, torch.from_numpy(flat))
    assert kind in KERNELS
    assert made.shape == (9, 6 * values)
    assert np.array_equal(made.dense().numpy(), gguf.quants.dequantize(flat, quant))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "Q5_0"])
def test_logits_are_those_of_the_values(original: Path, tmp_path: Path, kind: str) -> None:
    path, plain = write(original, kind, tmp_path)
    got, want = logits(Chain(path, 3)), logits(Chain(plain))
    assert np.array_equal(got, want)
    quantised = Chain(path, 1, "bfloat16")
    assert np.array_equal(logits(Chain(path, 3, "bfloat16", threads=2)), logits(quantised))


def test_the_package_reads_the_same_header(original: Path, tmp_path: Path) -> None:
    path, _ = write(original, "Q4_1", tmp_path)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields == dict(ours.fields)
    places = {t.name: (t.data_offset, t.n_bytes, t.shape.tolist()[::-1]) for t in theirs.tensors}
    assert places == {name: (t.offset, t.bytes, list(t.shape)) for name, t in ours.tensors.items()}


def test_a_blank_node_computes_with_what_it_is_given(original: Path, tmp_path: Path) -> None:
    """A peer passes on the blocks as one safetensors file: the same weights, and the same file when passed on again."""
    path, _ = write(original, "Q4_0", tmp_path)
    first = StageExecutor(path, 1, 2, num_blocks=4)
    given = tmp_path / "given"
    given.mkdir()
    bundle = open_bundle(path, 1, 2)
    for name in bundle.files:
        (given / name).write_bytes(bundle.read(name, 0, bundle.size(name)))
    assert holds_stage(path, 1, 2)
    assert holds_stage(given, 1, 2)
    named = {checkpoint_of(model, None) for model in (path, original, write(original, "Q4_1", tmp_path)[0])}
    assert len(named - {""}) == 3
    assert checkpoint_of(given, None) == "", "of one stage nobody can tell"
    second = StageExecutor(given, 1, 2, num_blocks=4)
    assert (first.weights_digest, first.numerics) == (second.weights_digest, second.numerics)
    again = open_bundle(given, 1, 2)
    assert again.read(SINGLE, 0, again.size(SINGLE)) == bundle.read(SINGLE, 0, bundle.size(SINGLE))


def test_tokenizer_and_template(original: Path, tmp_path: Path) -> None:
    path, _ = write(original, "Q8_0", tmp_path)
    files = {name: json.loads(content) for name, content in small_files(path).items()}
    tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    for text in ("hello hello", "<|start|>he 1212\n\n<|end|>", "naïve\t\u65e5\u672c 🙂"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|start|>hello he").tokens == ["<|start|>", "hello", "Ġhe"]
    assert tokenizer.encode("12").tokens == ["1", "2"], "smollm's digits stand alone"
    settings = files["tokenizer_config.json"]
    assert (settings["bos_token"], settings["eos_token"]) == ("<|start|>", "<|end|>")
    assert settings["chat_template"].startswith("{{ bos_token }}")
    config = load_config(path)
    assert (config.rms_norm_eps, config.eos_token_ids, config.tie_embeddings) == (1e-5, (1,), True)
    folder = folder_of(path, tmp_path / "run")
    assert sorted(file.name for file in folder.iterdir()) == sorted(files)
    assert folder == folder_of(path, tmp_path / "run")
    assert folder_of(original, tmp_path) == original


def test_sentence_piece() -> None:
    """Pieces are joined by their scores, bytes stand in for what is unknown, a text begins with a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    types = [2, 3, 3, *[6] * 256, *[1] * 6]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0]
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(fields)))
    assert tokenizer.encode("ab a").tokens == ["<s>", "▁ab", "▁a"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é a").ids) == "ab é a"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"general__architecture": "mamba"}, "'mamba' is not supported"),
        ({"tokenizer__ggml__pre": "tekken"}, "'tekken' is not supported"),
        ({"tokenizer__ggml__model": "rwkv"}, "'rwkv' is not supported"),
    ],
)
def test_what_is_not_supported_is_named(
    original: Path, tmp_path: Path, fields: dict[str, str], reason: str
) -> None:
    path, _ = write(original, "Q8_0", tmp_path)
    content = path.read_bytes()
    for key, value in fields.items():
        name = key.replace("__", ".").encode()
        start = content.index(name) + len(name) + 4
        (length,) = struct.unpack_from("<Q", content, start)
        put = struct.pack("<Q", len(value)) + value.encode()
        content = content[:start] + put + content[start + 8 + length :]
    path.write_bytes(content)
    with pytest.raises(GgufError, match=reason):
        small_files(path)


def test_a_damaged_file_is_an_error_of_the_file(original: Path, tmp_path: Path) -> None:
    path, _ = write(original, "Q8_0", tmp_path)
    content = path.read_bytes()
    broken = tmp_path / "broken.gguf"
    numbers = np.random.default_rng(2)
    for length in (0, 3, 30, 500, len(content) - 1):
        broken.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"broken\.gguf"):
            load_config(broken)
    for _ in range(200):
        damaged = bytearray(content[: 1 << 14])
        for at in numbers.integers(0, 6000, 3):
            damaged[at] = numbers.integers(256)
        broken.write_bytes(bytes(damaged) + content[1 << 14 :])
        try:
            read_header(broken)
        except GgufError:
            continue


def test_values_that_have_no_kernel_become_dense(original: Path, tmp_path: Path) -> None:
    path, _ = write(original, "Q5_0", tmp_path)
    config = load_config(path)
    tensors = load_weights(path, config, range(1))
    assert not isinstance(weight_of(config, "model.layers.0.mlp.up_proj.weight", tensors), Quantised)
    assert isinstance(weight_of(config, "model.embed_tokens.weight", tensors), Quantised)
