"""Text and log probabilities over HTTP, of a model whose tokens may be single bytes (as Llama 2's and Mistral's)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from controlplane.contract.requests import Submit
from tests.core.gateway.tokenizers_of_kinds import byte_fallback
from tests.web.gateway.stack import Stack, beside, demo_model, running, stream
from web.gateway.text.vocabulary import vocabulary_of

TOKENIZER = byte_fallback()
OK, FINE, DONE, HELLO = (TOKENIZER.token_to_id(t) for t in ("▁ok", "▁fine", "▁done", "▁Hello"))
BOS, EOS = 0, 1
PROMPT = [BOS, HELLO]


def of_bytes(text: str) -> list[int]:
    return [TOKENIZER.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


EMOJI, THAI = of_bytes("🎉"), of_bytes("กข")


def says(ids: Sequence[int], body: Callable[[Stack], Awaitable[None]]) -> None:
    """Run `body` beside nodes whose model says `ids`, whatever it is asked."""

    def speak(_: Submit, position: int) -> int:
        return ids[position] if position < len(ids) else EOS

    async def run() -> None:
        model = dataclasses.replace(
            demo_model(), tokenizer=TOKENIZER, vocabulary=vocabulary_of(TOKENIZER), eos_token_ids=(EOS,)
        )
        async with running(model=model, speak=speak) as stack, asyncio.timeout(20):
            await body(stack)

    asyncio.run(run())


async def complete(stack: Stack, **request: Any) -> dict[str, Any]:
    """The one choice of a completion, after its stream has said the same."""
    request = {"prompt": PROMPT, "max_tokens": 32, "seed": 1, **request}
    async with stack.http() as client:
        answer = await client.post("/v1/completions", json=request)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        events = await stream(client, request)
        assert (events.text(), events.finish()) == (choice["text"], choice["finish_reason"])
        if "logprobs" in request:
            parts = [c["choices"][0]["logprobs"] for c in events.chunks]
            joined = {key: [item for part in parts for item in part[key]] for key in parts[0]}
            assert joined == choice["logprobs"]
    return choice


def test_a_character_that_the_prompt_began() -> None:
    async def body(stack: Stack) -> None:
        choice = await complete(stack, prompt=[*PROMPT, *EMOJI[:3]])
        assert choice["text"] == "🎉 ok fine done"
        echo = await complete(stack, prompt=[*PROMPT, *EMOJI[:3]], echo=True)
        assert echo["text"] == "Hello🎉 ok fine done"

    says([EMOJI[3], OK, FINE, DONE], body)


@pytest.mark.parametrize(("count", "text"), [(1, ""), (2, ""), (3, "ก"), (4, "ก"), (5, "ก"), (6, "กข")])
def test_an_answer_ends_with_a_whole_character(count: int, text: str) -> None:
    async def body(stack: Stack) -> None:
        assert (await complete(stack, max_tokens=count))["text"] == text
        logged = await complete(stack, max_tokens=count, logprobs=1)
        assert (logged["text"], len(logged["logprobs"]["tokens"])) == (text, count)
        client = stack.openai()
        messages: list[Any] = [{"role": "user", "content": "x"}]
        chat = await client.chat.completions.create(
            model="kevlar-demo", messages=messages, max_tokens=count, logprobs=True
        )
        entries = chat.choices[0].logprobs
        assert entries is not None
        assert entries.content is not None
        assert chat.choices[0].message.content == text
        assert b"".join(bytes(entry.bytes or []) for entry in entries.content) == text.encode()

    says(THAI, body)


def test_tokens_are_named_by_their_part_of_the_text() -> None:
    async def body(stack: Stack) -> None:
        choice = await complete(stack, logprobs=5)
        found = choice["logprobs"]
        assert choice["text"] == " fine done🎉"
        assert found["tokens"][:2] == [" fine", " done"]
        assert found["tokens"][2:] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x8e", "bytes:\\x89", "</s>"]
        assert found["text_offset"] == [0, 5, 10, 10, 10, 10, 11]
        for name, value, top in zip(
            found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
        ):
            assert len(top) == 5
            assert top[name] == value

    says([FINE, DONE, *EMOJI], body)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_tokens_and_text_alike(include: bool) -> None:
    async def body(stack: Stack) -> None:
        request = {"messages": [{"role": "user", "content": "x"}], "stop": ["ne do"], "logprobs": True}
        request["include_stop_str_in_output"] = include
        async with stack.http() as client:
            choice = (await client.post("/v1/chat/completions", json=request)).json()["choices"][0]
            events = await stream(client, request, "/v1/chat/completions")
        text = " ok fine do" if include else " ok fi"
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        for entries in (
            choice["logprobs"]["content"],
            [
                e
                for c in events.chunks
                for x in c["choices"]
                if x["logprobs"]
                for e in x["logprobs"]["content"]
            ],
        ):
            assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
            assert [entry["token"] for entry in entries] == [" ok", " fine", " done"]
        assert events.text() == text

    says([OK, FINE, DONE, OK], body)


def test_a_stream_with_log_probabilities_goes_on_at_another_gateway() -> None:
    ids = [OK, *EMOJI, FINE, *THAI, DONE, OK]

    async def body(stack: Stack) -> None:
        request = {"prompt": PROMPT, "max_tokens": 20, "seed": 1, "logprobs": 2, "stop": ["zz", "done done"]}
        async with beside(stack) as other, stack.http() as client, other.http() as client2:
            whole = await stream(client, request)
            all_text, count = whole.text(), 0
            parts = [c["choices"][0]["logprobs"] for c in whole.chunks]
            assert all_text == " ok🎉 fineกข done ok"
            for at in range(len(whole.chunks) - 1):
                count += len(parts[at]["tokens"])
                ticket = whole.last_id.partition(".")[0]
                again = {"last-event-id": f"{ticket}.{count}"}
                async with client2.stream(
                    "POST",
                    "/v1/completions",
                    json={"model": "kevlar-demo", "stream": True, **request},
                    headers=again,
                ) as response:
                    lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
                chunks = [json.loads(line[6:])["choices"][0] for line in lines]
                before = "".join(c["choices"][0]["text"] for c in whole.chunks[: at + 1])
                assert before + "".join(c["text"] for c in chunks) == all_text
                for key in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
                    had = [item for part in parts[: at + 1] for item in part[key]]
                    assert had + [i for c in chunks for i in c["logprobs"][key]] == [
                        item for part in parts for item in part[key]
                    ]

    says(ids, body)
