"""The OpenAPI document says what the gateway does: schemathesis drives a real one by it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.web.gateway.stack import KEY, Stack, running
from tests.web.schemathesis_run import check_by_document
from web.gateway.http.openapi import BODIES
from web.gateway.openai.requests import IGNORED, UNSUPPORTED

EXAMPLES = 5
HOOKS = "tests.web.gateway.plain_document"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CHAT = [{"role": "user", "content": "Hello"}]
CONTINUED = [*CHAT, {"role": "assistant", "content": "Once"}]
# What no schema can say all of, and what the gateway takes nevertheless: by path, bodies beside `model`.
TAKEN: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {
            "prompt": "a b c",
            "max_tokens": 4,
            "min_tokens": 2,
            "n": 1,
            "best_of": 2,
            "truncate_prompt_tokens": 2,
        },
        {"prompt": "a", "max_tokens": 2, "bad_words": ["zz"]},
        {"prompt": "a", "max_tokens": 2, "guided_choice": ["a", "b"]},
        {"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": "[ab]"}},
    ],
    "/v1/chat/completions": [
        {
            "messages": CONTINUED,
            "max_tokens": 4,
            "min_tokens": 4,
            "best_of": 1,
            "continue_final_message": True,
        },
        {"messages": CHAT, "max_tokens": 2, "bad_words": ["zz"], "truncate_prompt_tokens": -1},
        {
            "messages": CHAT,
            "max_tokens": 4,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
        {"messages": CHAT, "max_tokens": 2, "guided_regex": "[ab]"},
    ],
    "/v1/responses": [
        {"input": "Hello", "max_output_tokens": 2, "include": ["reasoning.encrypted_content"]},
        {
            "input": "Hello",
            "max_output_tokens": 4,
            "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
        },
        {"input": "Hello", "chat_template_kwargs": {"a": 1}, "max_output_tokens": 2},
    ],
    "/tokenize": [{"messages": CONTINUED, "continue_final_message": True}],
}
REFUSED: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [{"truncate_prompt_tokens": 0}, {"min_tokens": "2"}, {"best_of": 0}],
    "/v1/chat/completions": [{"min_tokens": -1}, {"chat_template": 1}, {"bad_words": [""]}],
    "/v1/responses": [{"max_output_tokens": 0}, {"include": ["file_search_call.results"]}, {"store": True}],
    "/tokenize": [{"continue_final_message": "yes"}],
}
BY_NAME = {kind.__name__: kind for kind in BODIES}


def with_stack(body: Callable[[Stack], Awaitable[None]], **knobs: Any) -> None:
    async def run() -> None:
        async with running(**knobs) as stack:
            await body(stack)

    asyncio.run(run())


@pytest.mark.timeout(450)  # 40 s on two quiet cores
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        await check_by_document(stack.url, KEY, EXAMPLES, 40, tmp_path, hooks=HOOKS)

    with_stack(body, burst=64, step_s=0.001)


def test_the_document() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            document = (await client.get("/openapi.json")).json()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                answers = set(operation["responses"])
                if method == "options":
                    assert {"204", "400", "500", "503"} <= answers, path
                    continue
                assert {"200", "400", "405", "500", "503"} <= answers, path
                assert ("401" in answers) == bool(operation["security"]), path
                if method == "post":
                    assert {"408", "413", "415"} <= answers, path
                    name = operation["requestBody"]["content"]["application/json"]["schema"][
                        "$ref"
                    ].rpartition("/")[2]
                    schema = document["components"]["schemas"][name]
                    assert schema["additionalProperties"] is False
                    assert set(UNSUPPORTED) | IGNORED <= set(schema["properties"]), "clients may send these"
                    fields = {field.alias or name for name, field in BY_NAME[name].model_fields.items()}
                    assert fields <= set(schema["properties"])
                    assert "403" in answers, "a key may be for other models"
        paths = document["paths"]
        assert {"409", "422", "429"} <= set(paths["/v1/completions"]["post"]["responses"])
        assert "410" in paths["/v1/streams/{stream}"]["get"]["responses"]
        names = {parameter["name"] for parameter in paths["/v1/chat/completions"]["post"]["parameters"]}
        assert "Last-Event-ID" in names
        assert "Idempotency-Key" in paths["/v1/chat/completions"]["post"]["description"]

    with_stack(body)


def test_every_route_is_described() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            described = (await client.get("/openapi.json")).json()["paths"]
            for path, methods in described.items():
                concrete = path.replace("{name}", "x").replace("{stream}", "x")
                allow = (await client.options(concrete)).headers["allow"].split(", ")
                assert {m.upper() for m in methods} == set(allow), path


def test_what_is_taken_is_in_the_schemas_and_what_they_refuse_is_refused() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            document = (await client.get("/openapi.json")).json()
            for path, bodies in TAKEN.items():
                schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"][
                    "schema"
                ]
                validator = jsonschema_rs.validator_for(schema | {"components": document["components"]})
                for asked in bodies:
                    validator.validate(asked)
                    answer = await client.post(path, json=asked)
                    assert answer.status_code == 200, (asked, answer.text)
                for wrong in REFUSED[path]:
                    asked = bodies[0] | wrong
                    assert not validator.is_valid(asked), wrong
                    assert (await client.post(path, json=asked)).status_code == 400, wrong

    with_stack(body)


def test_head_and_options_answer_as_described() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for path, methods in (await client.get("/openapi.json")).json()["paths"].items():
                said = methods["options"]["responses"]["204"]
                assert ("content" in said, "Allow" in said["headers"]) == (False, True), path
                if "head" in methods:
                    assert set(methods["head"]["responses"]) == set(methods["get"]["responses"]), path
                    assert not any("content" in said for said in methods["head"]["responses"].values())

    with_stack(body)
    with_stack(body)
