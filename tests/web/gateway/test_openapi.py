"""The OpenAPI document says what the gateway does: schemathesis drives a real one by it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.web.gateway.stack import KEY, Stack, running
from tests.web.schemathesis_run import check_by_document
from web.gateway.openai.requests import IGNORED, UNSUPPORTED

EXAMPLES = 5
# Described in words, where a body may have them.
ELSEWHERE = {"bad_words", "chat_template", "continue_final_message", "truncate_prompt_tokens"}


def with_stack(body: Callable[[Stack], Awaitable[None]], **knobs: Any) -> None:
    async def run() -> None:
        async with running(**knobs) as stack:
            await body(stack)

    asyncio.run(run())


@pytest.mark.timeout(450)  # 40 s on two quiet cores
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        await check_by_document(stack.url, KEY, EXAMPLES, 15, tmp_path)

    with_stack(body, burst=64, step_s=0.001)


def test_the_document() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            document = (await client.get("/openapi.json")).json()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                answers = set(operation["responses"])
                assert {"200", "400", "405", "500", "503"} <= answers, path
                assert ("401" in answers) == bool(operation["security"]), path
                if method == "post":
                    assert {"408", "413", "415"} <= answers, path
                    name = operation["requestBody"]["content"]["application/json"]["schema"][
                        "$ref"
                    ].rpartition("/")[2]
                    schema = document["components"]["schemas"][name]
                    assert schema["additionalProperties"] is False
                    assert (set(UNSUPPORTED) - ELSEWHERE) | IGNORED <= set(schema["properties"]), (
                        "clients may send these"
                    )
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
                assert {m.upper() for m in methods} == set(allow) - {"HEAD", "OPTIONS"}, path

    with_stack(body)
