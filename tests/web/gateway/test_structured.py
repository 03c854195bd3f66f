"""Structured output over HTTP: what nodes are told, and what clients are."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from typing import Any

import pytest

from controlplane.contract.requests import RefusalCode
from controlplane.grammar import GrammarError
from tests.web.gateway.stack import MODEL, Stack, demo_model, stream, with_stack
from web.gateway.text.grammars import KNOWN_MAX, WAITING_MAX, GrammarChecker, TooManyGrammars

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
COMPLETION = {"model": MODEL, "prompt": "x", "max_tokens": 4}


async def refused(stack: Stack, body: dict[str, Any], path: str = "/v1/chat/completions") -> dict[str, Any]:
    async with stack.http() as client:
        answer = await client.post(path, json=body)
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == answer.status_code
    return error


def test_nodes_get_the_grammar_with_each_choice_and_the_ends_of_text() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for path, wanted in (
                ("/v1/chat/completions", CHAT | {"response_format": FORMAT, "n": 2}),
                ("/v1/completions", COMPLETION | {"structured_outputs": {"json": SCHEMA}, "n": 2}),
            ):
                assert (await client.post(path, json=wanted)).status_code == 200
        samplings = [submit.sampling for node in stack.nodes for submit in node.submits]
        assert len(samplings) == 4
        assert len({sampling.grammar for sampling in samplings}) == 1
        assert json.loads(samplings[0].grammar)["grammars"][0]["json_schema"]["required"] == ["a"]
        assert {1, 2} <= set(samplings[0].stop_token_ids)
        async with stack.http() as client:
            await client.post("/v1/completions", json=COMPLETION)
        assert [s.sampling.grammar for node in stack.nodes for s in node.submits].count("") == 1

    with_stack(body)


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
            "response_format",
            'Unimplemented keys: ["not"]',
        ),
        (
            {"structured_outputs": {"json": {"type": "array", "items": {}, "uniqueItems": True}}},
            "structured_outputs",
            "uniqueItems",
        ),
        ({"guided_json": {"$ref": "https://example.com/s.json"}}, "guided_json", "not fetch"),
        ({"guided_json": False}, "guided_json", "Unsatisfiable"),
        ({"guided_json": {"type": "string", "pattern": "(?=a)b"}}, "guided_json", "look-ahead"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", 'unknown name: "nothing"'),
        (
            {
                "guided_json": {
                    "anyOf": [{"type": "object", "properties": {f"k{i}": {}}} for i in range(2500)]
                }
            },
            "guided_json",
            "items",
        ),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "guided_choice"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name_and_never_submitted(
    fields: dict[str, Any], param: str, why: str
) -> None:
    async def body(stack: Stack) -> None:
        for _ in range(2):  # the second time from memory
            error = await refused(stack, CHAT | fields)
            assert (error["code"], error["param"]) == (400, param)
            assert why in error["message"]
            assert "\n" not in error["message"]
        assert not any(node.submits for node in stack.nodes)

    with_stack(body)


def test_a_node_of_an_older_release_would_pass_over_the_grammar() -> None:
    async def body(stack: Stack) -> None:
        context = stack.service.model.context
        context.registered("n0", 2048, "1.9.1", 1)
        context.registered("n5", 2048, "", 0)
        error = await refused(stack, CHAT | {"response_format": FORMAT})
        assert error["code"] == 503
        assert "n5" in error["message"]
        async with stack.http() as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            context.registered("n5", 2048, "1.9.1", 1)
            wanted = CHAT | {"response_format": FORMAT}
            assert (await client.post("/v1/chat/completions", json=wanted)).status_code == 200
            context.registered("n5", 2048, "", 0)
            context.keep(["n0"])  # it has left the group
            assert (await client.post("/v1/chat/completions", json=wanted)).status_code == 200

    with_stack(body)


def test_a_grammar_that_fails_on_the_way_ends_the_stream_with_the_reason() -> None:
    async def body(stack: Stack) -> None:
        for node in stack.nodes:
            node.refuse = lambda submit: RefusalCode.INVALID
        error = await refused(stack, CHAT | {"response_format": FORMAT})
        assert error["code"] == 400

    with_stack(body)


def test_a_stream_is_resumed_with_its_grammar() -> None:
    """By its body, and without: then the log has it."""

    async def body(stack: Stack) -> None:
        wanted = COMPLETION | {"guided_json": SCHEMA, "max_tokens": 40, "seed": 4}
        async with stack.http() as client:
            whole = await stream(client, wanted)
            assert whole.done
            again = await client.post(
                "/v1/completions",
                json=wanted | {"stream": True},
                headers={"last-event-id": whole.last_id},
            )
            assert again.status_code == 200
            other = wanted | {"guided_json": {"type": "array"}, "stream": True}
            error = await client.post("/v1/completions", json=other, headers={"last-event-id": whole.last_id})
            assert error.status_code == 422, "another grammar is another answer"
            name = whole.last_id.partition(".")[0]
            assert (await client.get(f"/v1/streams/{name}")).status_code == 200
        grammars = {submit.sampling.grammar for node in stack.nodes for submit in node.submits}
        assert len(grammars) == 1

    with_stack(body)


def checker() -> GrammarChecker:
    return demo_model().grammars


def test_other_requests_go_on_while_a_grammar_is_compiled() -> None:
    async def body(stack: Stack) -> None:
        made, go = stack.service.model.grammars, threading.Event()
        slow = asyncio.create_task(made.check(lambda: "start: /a/" if go.wait(10) else ""))
        async with stack.http() as client:
            for wanted in (COMPLETION, COMPLETION | {"guided_choice": ["a"]}):
                assert (await client.post("/v1/completions", json=wanted)).status_code == 200
        assert not slow.done()
        go.set()
        assert await slow == "start: /a/"

    with_stack(body)


def test_how_many_are_compiled_at_a_time_is_bounded() -> None:
    async def run() -> None:
        made, go = checker(), threading.Event()
        tasks = [
            asyncio.create_task(made.check(lambda: f"start: /{go.wait(10)}/")) for _ in range(WAITING_MAX)
        ]
        await asyncio.sleep(0)
        with pytest.raises(TooManyGrammars):
            await made.check(lambda: "start: /a/")
        tasks[0].cancel()  # its client has hung up: the thread works on
        await asyncio.sleep(0)
        with pytest.raises(TooManyGrammars):
            await made.check(lambda: "start: /a/")
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        deadline = time.monotonic() + 10
        while made._waiting:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert await made.check(lambda: "start: /a/") == "start: /a/"

    asyncio.run(run())


def test_keys_take_turns_at_compiling() -> None:
    """One with many grammars that take long keeps others waiting for those that are being compiled, not for all."""

    async def run() -> None:
        made, go = checker(), threading.Event()
        done: list[str] = []

        def of(owner: str, number: int) -> str:
            if owner == "many":
                go.wait(10)
            done.append(owner)
            return f"start: /{owner}{number}/"

        many = [asyncio.create_task(made.check(functools.partial(of, "many", n), b"many")) for n in range(40)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(made.check(functools.partial(of, "few", n), b"few")) for n in range(3)]
        await asyncio.sleep(0)
        many[20].cancel()  # its client has hung up: nothing is compiled for it
        await asyncio.sleep(0)
        assert made._waiting.total() == 42
        go.set()
        assert await asyncio.gather(*few) == [f"start: /few{n}/" for n in range(3)]
        await asyncio.gather(*many, return_exceptions=True)
        assert len(done) == 42
        assert [at for at, owner in enumerate(done) if owner == "few"][-1] < 12
        assert not made._waiting
        assert not made._turns

    asyncio.run(run())


def test_what_is_remembered_of_checks_is_bounded() -> None:
    async def run() -> None:
        made = checker()
        for number in range(KNOWN_MAX + 30):
            await made.check(lambda number=number: f'start: "{number}"')  # type: ignore[misc]
        assert len(made._known) == KNOWN_MAX
        with pytest.raises(GrammarError, match="nothing"):
            await made.check(lambda: "start: nothing")

    asyncio.run(run())
