"""kill -9 under a mixture of experts: the tokens are those of an undisturbed run, whoever is in a batch with whom."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from controlplane.contract.config import EngineConfig
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from controlplane.kfadmin.up import demo_model
from tests.e2e.cluster import Cluster, until, while_streaming

TOKENS = 64


def make_mixture(folder: Path) -> None:
    """A small Qwen3-MoE of random weights with the tokenizer of the demo model."""
    vocab = json.loads((demo_model() / "config.json").read_text())["vocab_size"]
    torch.manual_seed(11)
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15,
        num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for path in demo_model().iterdir():
        if not (folder / path.name).exists() and path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    (folder / "generation_config.json").write_text("{}")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, etcd_binary: None) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("model")
    make_mixture(folder)
    engine = EngineConfig(pool_blocks=512, dtype="bfloat16")
    with Cluster(instances=2, stages=2, engine=engine, model=str(folder)) as running:
        yield running


@pytest.mark.parametrize("victim", ["n0", "n3"])
def test_a_killed_node_costs_no_token(mixture: Cluster, victim: str) -> None:
    asked = sample_prompts(6, TOKENS)
    asyncio.run(mixture.wait_all_home())
    asyncio.run(mixture.references(asked))

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) >= 12 for stream in streams), "tokens flow")
        mixture.kill(victim)

    streams = asyncio.run(while_streaming(mixture, asked, kill))
    asyncio.run(mixture.expect_equal(streams))
    asyncio.run(mixture.wait_all_home())
