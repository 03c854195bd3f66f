"""What the operator may have got wrong is said with the file and the reason; keys are compared as hashes."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

import dataplane.demo
from controlplane.contract.config import ClusterConfig, EngineConfig
from controlplane.contract.errors import ConfigError
from tests.web.gateway.stack import running
from web.gateway.model import load_model
from web.gateway.policy import policy_of


def settings(model: Path, **engine: Any) -> ClusterConfig:
    return ClusterConfig(run_dir="x", model=str(model), etcd=(), instances=3, engine=EngineConfig(**engine))


def copy_model(folder: Path, **config: object) -> Path:
    source = dataplane.demo.model_dir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({"vocab_size": 2048, "eos_token_id": 7} | config))
    return folder


def test_model_settings(tmp_path: Path) -> None:
    model = load_model(settings(copy_model(tmp_path, max_position_embeddings=512)))
    assert (model.max_model_len, model.vocab_size, model.name) == (512, 2048, tmp_path.name)
    assert model.eos_token_ids == (1, 2)
    assert load_model(settings(tmp_path, max_model_len=100)).max_model_len == 100
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}')
    model = load_model(settings(tmp_path))
    assert model.defaults == {"temperature": 0.6, "top_k": 20}
    assert (model.max_new_tokens, model.eos_token_ids) == (9, (7, 1))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    template = load_model(settings(tmp_path)).template
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi!"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_and_broken_files_are_named(tmp_path: Path, name: str) -> None:
    copy_model(tmp_path, max_position_embeddings=512)
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=name):
        load_model(settings(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=name):
        load_model(settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"max_position_embeddings": "512"}),
        ("config.json", {"max_position_embeddings": True}),
        ("config.json", {"vocab_size": 0}),
        ("config.json", {"eos_token_id": "</s>"}),
        ("config.json", {"eos_token_id": [True]}),
        ("config.json", {"text_config": 1}),
        ("generation_config.json", {"temperature": "hot"}),
        ("generation_config.json", {"temperature": float("nan")}),
        ("generation_config.json", {"temperature": -1}),
        ("generation_config.json", {"top_p": 1.5}),
        ("generation_config.json", {"top_k": 1.5}),
        ("generation_config.json", {"min_p": 2}),
        ("generation_config.json", {"repetition_penalty": float("inf")}),
        ("generation_config.json", {"max_new_tokens": 0}),
        ("generation_config.json", {"eos_token_id": [1, -1]}),
    ],
)
def test_wrong_values_are_named_at_the_start(tmp_path: Path, name: str, values: dict[str, object]) -> None:
    copy_model(tmp_path, max_position_embeddings=512)
    (tmp_path / "generation_config.json").write_text("{}")
    given = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(given | values))
    with pytest.raises(ConfigError, match=f"{name}: {next(iter(values))}: "):
        load_model(settings(tmp_path))


def test_null_says_nothing(tmp_path: Path) -> None:
    copy_model(tmp_path, max_position_embeddings=None, vocab_size=None, text_config=None)
    nulls = dict.fromkeys(("eos_token_id", "temperature", "top_p", "max_new_tokens"))
    (tmp_path / "generation_config.json").write_text(json.dumps(nulls))
    model = load_model(settings(tmp_path, max_model_len=100))
    assert (model.max_model_len, model.vocab_size) == (100, 2048)
    assert model.eos_token_ids == (7, 1), "without them a stream ends at its length only"
    assert (model.defaults, model.max_new_tokens) == ({}, None)


@pytest.mark.parametrize(
    ("name", "ids"),
    [("<|eos|>", (1,)), ({"content": "<|end|>"}, (2,)), (None, ()), ("<|other|>", ()), ({}, ()), ([1], ())],
)
def test_the_tokenizers_end_counts_where_the_model_names_none(
    tmp_path: Path, name: object, ids: tuple[int, ...]
) -> None:
    copy_model(tmp_path, max_position_embeddings=512, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    assert load_model(settings(tmp_path)).eos_token_ids == ids


def test_the_tokenizers_end_may_stand_in_the_older_file(tmp_path: Path) -> None:
    copy_model(tmp_path, max_position_embeddings=512, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    model = load_model(settings(tmp_path))
    assert (model.eos_token_ids, model.special_tokens["eos_token"]) == ((2,), "<|end|>")


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (7, None, (7, 1)),
        (7, {"eos_token_id": [8, 9]}, (8, 9, 1)),
        (7, {"eos_token_id": [2, 1, 2]}, (2, 1)),
        ([7, 1], {"eos_token_id": None}, (7, 1)),
        (7, {"eos_token_id": []}, (7, 1)),
        (9999, {"eos_token_id": [8, 2048]}, (8, 1)),  # ids that this vocabulary does not have
        (7.0, {"eos_token_id": [8.0]}, (8, 1)),  # JSON has one kind of number
    ],
)
def test_the_tokenizers_end_ends_a_turn_whatever_the_model_names(
    tmp_path: Path, config: object, generation: dict[str, object] | None, ids: tuple[int, ...]
) -> None:
    """A model that was taught to chat ends its turns with a token that the files of its base model do not name, and
    streams went on to their length."""
    copy_model(tmp_path, max_position_embeddings=512, eos_token_id=config)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    assert load_model(settings(tmp_path)).eos_token_ids == ids


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    copy_model(tmp_path, max_position_embeddings=512)
    (tmp_path / "generation_config.json").write_text('{"top_k": 50.0, "max_new_tokens": 9.0, "top_p": 1.0}')
    model = load_model(settings(tmp_path))
    assert (model.defaults, model.max_new_tokens) == ({"top_k": 50, "top_p": 1.0}, 9)


def test_tokens_that_the_model_was_not_taught_are_refused(tmp_path: Path) -> None:
    """A tokenizer may have more than its model: a node has no row for them."""
    model = load_model(settings(copy_model(tmp_path, max_position_embeddings=512, vocab_size=300)))
    (known, unknown) = (model.tokenizer.id_to_token(i) for i in (299, 300))

    async def body() -> None:
        async with running(model=model) as stack, stack.http() as client:
            assert (await client.post("/v1/completions", json={"prompt": known})).status_code == 200
            for path, asked in (
                ("/v1/completions", {"prompt": unknown}),
                ("/v1/completions", {"prompt": known, "bad_words": [unknown]}),
                ("/tokenize", {"prompt": unknown}),
            ):
                refused = await client.post(path, json=asked)
                assert (refused.status_code, "this model has 300" in refused.text) == (400, True), (
                    refused.text
                )

    asyncio.run(body())


def test_no_end_is_not_the_token_none(tmp_path: Path) -> None:
    copy_model(tmp_path, max_position_embeddings=512, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    added = {"2048": {"content": "None"}}
    for end in (None, {"content": None}):
        config = {"eos_token": end, "added_tokens_decoder": added}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_model(settings(tmp_path)).eos_token_ids == ()


def test_tokens_that_stand_only_in_the_tokenizers_settings(tmp_path: Path) -> None:
    copy_model(tmp_path, max_position_embeddings=512, vocab_size=2050)
    added = {
        "2049": {"content": "[note]", "special": False},
        "1": {"content": "<|eos|>", "special": True},  # as tokenizer.json has it
        "2048": {"content": "<|tool|>", "special": True, "lstrip": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    model = load_model(settings(tmp_path))
    a = model.tokenizer.token_to_id("a")
    assert asyncio.run(model.encode("a <|tool|>a[note]", False)) == [a, 2048, a, 2049]
    assert model.decode([a, 2048, 2049, 1]) == "a<|tool|>[note]<|eos|>"
    assert model.decode([a, 2048, 2049, 1], skip_special_tokens=True) == "a[note]"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("a <|tool|>a[note]", add_special_tokens=False) == [a, 2048, a, 2049]


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ({"2050": {"content": "<|tool|>"}}, "'<|tool|>' is token 2048, not 2050"),
        ({"x": {"content": "a"}}, "it does not hold tokens by their ids"),
        ({"2048": "a"}, "it does not hold tokens by their ids"),
        ([1], "it does not hold tokens by their ids"),
    ],
)
def test_added_tokens_that_cannot_be(tmp_path: Path, added: object, told: str) -> None:
    copy_model(tmp_path, max_position_embeddings=512)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_model(settings(tmp_path))


def test_the_context_that_the_pool_holds_is_the_one_that_is_served(tmp_path: Path) -> None:
    """131,072 by config.json, and streams ended at 16,384 with `length`: half of the default pool."""
    copy_model(tmp_path, max_position_embeddings=131072)
    context = load_model(settings(tmp_path)).context
    assert context.tokens == 2048 // 2 * 16
    assert load_model(settings(tmp_path, pool_blocks=513, block_size=4)).max_model_len == 1024
    assert load_model(settings(tmp_path, pool_blocks=1 << 20)).max_model_len == 131072
    # Nodes know better, and a request may come to any of them.
    context.registered("n0", 16384, "1.9", 1)
    context.registered("n1", 8000, "1.9", 1)
    context.registered("n2", 0, "", 0)  # an older one, which does not say
    assert context.tokens == 8000
    context.registered("n1", 9000, "1.9", 1)  # it was started again
    assert context.tokens == 9000
    context.keep(["n0", "n2"])
    assert context.tokens == 16384


def test_unknown_context_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        load_model(settings(copy_model(tmp_path)))


def test_policy_follows_the_settings() -> None:
    policy = policy_of(settings(Path("x"), max_running=2, max_waiting=3))
    assert policy.live_max == 15


def test_a_template_that_cannot_be_compiled_leaves_completions(tmp_path: Path) -> None:
    copy_model(tmp_path, max_position_embeddings=512)
    (tmp_path / "chat_template.jinja").write_text("{% nonsense %}")

    async def body() -> None:
        async with running(model=load_model(settings(tmp_path))) as stack, stack.http() as client:
            answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200
            for path in ("/v1/chat/completions", "/tokenize"):
                refused = await client.post(path, json={"messages": [{"role": "user", "content": "a"}]})
                assert refused.status_code == 400
                message = refused.json()["error"]["message"]
                assert message.startswith("the model's chat template cannot be used: ")
                assert "nonsense" in message

    asyncio.run(body())
