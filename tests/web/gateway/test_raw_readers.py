"""Readers that know nothing of server-sent events but `data: `: each line, or each block, is taken for it.

So do load generators: `vllm bench serve` reads blocks, SGLang's bench_serving and llmperf read lines.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.web.gateway.stack import Stack, with_stack
from tests.web.gateway.test_resume import read

PATHS = ("/v1/completions", "/v1/chat/completions")
ASKED: dict[str, Any] = {"seed": 1, "max_tokens": 30, "ignore_eos": True, "stream": True}
PLAIN = {"include_usage": True, "include_event_ids": False}


def body_of(path: str, **more: Any) -> dict[str, Any]:
    said = {"prompt": "Hello"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "Hello"}]}
    return ASKED | said | {"stream_options": PLAIN} | more


def lines(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line]


def blocks(text: str) -> list[str]:
    """They pass over those that are comments."""
    found = [block.strip() for block in text.split("\n\n")]
    return [block.removeprefix("data: ") for block in found if block and not block.startswith(":")]


def read_all(datas: list[str]) -> tuple[str, dict[str, Any] | None]:
    """The text and the usage; whatever is no JSON is an error, as there."""
    text, usage = "", None
    assert datas.pop() == "[DONE]"
    for chunk in map(json.loads, datas):
        usage = chunk["usage"] or usage
        for choice in chunk["choices"]:
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text, usage


@pytest.mark.parametrize("path", PATHS)
def test_every_line_is_data(path: str) -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            whole = (await client.post(path, json=body_of(path, stream=False, stream_options=None))).json()
            choice = whole["choices"][0]
            wanted = choice["text"] if "text" in choice else choice["message"]["content"]
            answer = await client.post(path, json=body_of(path))
            assert read_all(lines(answer.text)) == read_all(blocks(answer.text)) == (wanted, whole["usage"])
            # Whoever comes back by the stream's own address reads ids.
            again = await read(client, "GET", answer.headers["content-location"], {})
            assert all(name for name, data in again if data != "[DONE]")
            assert read_all([data for _, data in again]) == (wanted, whole["usage"])

    with_stack(body)


@pytest.mark.parametrize("path", PATHS)
def test_a_pause_hides_no_token(path: str) -> None:
    """A keep-alive is a block of its own: with what follows in the same one, that would be passed over."""

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            wanted = read_all(blocks((await client.post(path, json=body_of(path))).text))
            seen = ""
            async with client.stream("POST", path, json=body_of(path)) as response:
                async for part in response.aiter_text():
                    seen += part
                    if seen.count("data: ") >= 5:
                        for node in stack.nodes:
                            node.held = seen.count(": keep-alive\n\n") < 3
            assert seen.count(": keep-alive") >= 3
            assert read_all(blocks(seen)) == wanted

    with_stack(body, keep_alive_s=0.05)


def test_a_gateway_that_stops_ends_the_stream_with_an_error() -> None:
    """Its client has no id to go on by elsewhere."""

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            asked = body_of(PATHS[0], max_tokens=400)
            seen = ""
            async with client.stream("POST", PATHS[0], json=asked) as response:
                async for part in response.aiter_text():
                    seen += part
                    if seen.count("data: ") >= 5:
                        stack.stop()
            assert lines(seen) == blocks(seen)
            *chunks, error, end = lines(seen)
            assert "shutting down" in json.loads(error)["error"]["message"]
            assert (end, len(chunks) >= 5) == ("[DONE]", True)

    with_stack(body)


def test_responses_without_ids() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            asked = {"input": "Hello", "stream": True, "stream_options": {"include_event_ids": False}}
            answer = await client.post("/v1/responses", json=asked | {"max_output_tokens": 5})
            assert {line.partition(":")[0] for line in answer.text.splitlines() if line} == {"event", "data"}

    with_stack(body)
