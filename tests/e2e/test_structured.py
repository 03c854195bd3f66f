"""Outputs that a schema holds to its letter: valid at any temperature, and the same whoever dies at whatever token."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, Literal

import jsonschema_rs
import pytest
from pydantic import BaseModel, ConfigDict

from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.e2e.test_clients import client
from tests.e2e.test_moves import kfadmin

TOKENS = 500
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 20, "maxLength": 40},
        "kind": {"enum": ["letter", "visit", "ball"]},
        "guests": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
                    "age": {"type": "integer", "minimum": 1, "maximum": 99},
                    "married": {"type": ["boolean", "null"]},
                },
                "required": ["name", "age", "married"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["title", "kind", "guests"],
    "additionalProperties": False,
}


def documents(count: int, **fields: Any) -> list[Prompt]:
    schema = json.dumps(SCHEMA)
    return [
        replace(prompt, schema=schema, ignore_eos=False, **fields)
        for prompt in sample_prompts(count, TOKENS, first_seed=100, temperature=1.0)
    ]


def check(streams: list[Stream]) -> None:
    for stream in streams:
        assert not stream.error
        if stream.finish_reason == "stop":
            jsonschema_rs.validate(SCHEMA, json.loads(stream.text))
        else:
            assert stream.finish_reason == "length"
            assert len(stream.tokens) == TOKENS
    ended = sum(stream.finish_reason == "stop" for stream in streams)
    assert ended > 0.9 * len(streams), "nearly all come to their end"


def test_documents_are_of_their_schema(home: Cluster) -> None:
    """64 of them at temperature 1, of a model that has seen no JSON, with free text beside them."""
    wanted = documents(64) + sample_prompts(16, 96)
    streams = asyncio.run(home.generator.streams(wanted))
    check(streams[:64])
    asyncio.run(home.expect_equal(streams[64:]))


@pytest.mark.parametrize(
    ("victim", "tokens"), [("n3", 1), ("n7", 12), ("n0", 30), ("n2", 55), ("n3", 80), ("n4", 100)]
)
def test_a_kill_changes_no_document(home: Cluster, victim: str, tokens: int) -> None:
    """Of the last stage, which follows the grammar, of the first, and of one between."""
    prompts = documents(16, details=True)
    references = asyncio.run(home.references(prompts))
    check(references)

    async def kill(streams: list[Stream]) -> None:
        await until(
            lambda: sum(len(s.tokens) for s in streams) >= tokens * len(streams), f"{tokens} tokens a stream"
        )
        home.kill(victim)

    streams = asyncio.run(while_streaming(home, prompts, kill))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())


def test_a_drain_of_the_last_stage_changes_no_document(home: Cluster) -> None:
    prompts = documents(16, details=True)
    asyncio.run(home.references(prompts))

    async def drain(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 160, "tokens flow")
        done = await asyncio.to_thread(kfadmin, home, "drain", "n3", "-o", "json")
        assert done.returncode == 0, done.stderr

    try:
        streams = asyncio.run(while_streaming(home, prompts, drain))
    finally:
        back = kfadmin(home, "undrain", "n3")
    assert back.returncode == 0, back.stderr
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())


class Guest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    kind: Literal["friend", "relation"]


class Party(BaseModel):
    model_config = ConfigDict(extra="forbid")
    host: Guest
    size: Literal[2, 4, 8]


def test_the_openai_client_parses(home: Cluster) -> None:
    """Its strict schemas, and its reader of streams."""
    wanted: Any = {
        "model": "kevlar-demo",
        "messages": [{"role": "user", "content": "The old house"}],
        "max_tokens": 600,
        "seed": 3,
    }
    with client(home) as ask:
        whole = ask.chat.completions.parse(**wanted, response_format=Party)
        assert isinstance(whole.choices[0].message.parsed, Party)
        assert whole.choices[0].finish_reason == "stop"
        with ask.chat.completions.stream(**wanted, response_format=Party) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.parsed == whole.choices[0].message.parsed
        free = ask.chat.completions.create(
            **wanted | {"max_tokens": 8}, response_format={"type": "json_object"}
        )
        assert (free.choices[0].message.content or "").startswith("{")
        assert free.choices[0].finish_reason == "length"
        for extra in (
            {"guided_choice": ["yes", "no"]},
            {"guided_regex": "yes|no"},
            {"guided_grammar": 'root ::= "yes" | "no"'},
            {"structured_outputs": {"grammar": 'start: "yes" | "no"'}},
        ):
            said = ask.completions.create(
                model="kevlar-demo", prompt="He said", max_tokens=20, extra_body=extra
            )
            assert said.choices[0].text in ("yes", "no"), extra
            assert said.choices[0].finish_reason == "stop"


def test_nothing_else_waits_for_a_large_grammar(home: Cluster) -> None:
    """The first request that brings it may; streams beside it go on."""
    large = {
        "type": "object",
        "properties": {f"field_{i}": {"enum": [f"v{i}_{k}" for k in range(20)]} for i in range(300)},
        "required": ["field_1"],
        "additionalProperties": False,
    }
    cold = replace(documents(1)[0], schema=json.dumps(large), max_tokens=24)
    prompts = [*sample_prompts(16, 128), cold]
    asyncio.run(home.references(prompts[:-1]))
    streams = asyncio.run(home.generator.streams(prompts))
    asyncio.run(home.expect_equal(streams[:-1]))
    assert streams[-1].text.startswith("{")
