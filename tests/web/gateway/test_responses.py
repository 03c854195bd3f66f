"""/v1/responses with the openai client's own helpers, and across gateways at every event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from starlette.types import Send

from tests.web.gateway.scripted import QWEN, scripted_model
from tests.web.gateway.stack import MODEL, Stack, beside
from tests.web.gateway.test_resume import read
from tests.web.gateway.test_tools import ADD, CALLS, WEATHER, GetWeather, with_model
from web.gateway.http.generation_response import GenerationResponse
from web.gateway.openai.long_lists import PIECE_BYTES
from web.gateway.request_memory import Memory

PATH = "/v1/responses"
CALL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": GetWeather.model_json_schema(),
    "strict": False,
}
PLUS: dict[str, Any] = {"type": "function", **ADD["function"]}
SAID = CALLS[QWEN]
ONLY: dict[str, Any] = {
    "type": "allowed_tools",
    "mode": "auto",
    "tools": [{"type": "function", "name": "get_weather"}],
}
IMAGE = {"type": "input_image", "image_url": "x"}


class Event(pydantic.BaseModel):
    name: str
    day: int


def output_of(response: Any) -> list[tuple[str, str]]:
    """Of each item its type and what it says."""
    found = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, f"{item.name} {item.arguments}"))
        else:
            found.append((item.type, "".join(part.text for part in item.content)))
    return found


OUTPUT = [
    ("reasoning", "Let me see."),
    ("message", "One moment."),
    ("function_call", f"get_weather {WEATHER}"),
    ("function_call", "add {}"),
]


def test_reasoning_a_message_and_calls(tmp_path: Path) -> None:
    """The same of an answer in one piece, of the client's streaming helper, and of raw events."""
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            asked: Any = {"model": MODEL, "input": "How is the weather?", "tools": [CALL, PLUS]}
            whole = await client.responses.create(**asked, extra_body={"seed": 0})
            assert output_of(whole) == OUTPUT
            assert (whole.status, whole.output_text, whole.error) == ("completed", "One moment.", None)
            assert whole.usage is not None
            assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
            assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
            deltas: dict[str, str] = {}
            numbers: list[int] = []
            kinds: list[str] = []
            async with client.responses.stream(**asked, extra_body={"seed": 0}) as stream:
                async for event in stream:
                    numbers.append(event.sequence_number)
                    kinds.append(event.type)
                    if event.type.endswith(".delta"):
                        deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
                final = await stream.get_final_response()
            assert numbers == sorted(set(numbers))
            assert kinds[:2] == ["response.created", "response.in_progress"]
            assert kinds[-1] == "response.completed"
            assert output_of(final) == OUTPUT
            assert list(deltas.values()) == ["Let me see.", "One moment.", WEATHER, "{}"]
            assert [item.id for item in final.output] == list(deltas)
            assert len({item.call_id for item in final.output if item.type == "function_call"}) == 2
            assert final.usage == whole.usage

    with_model(model, [SAID], body)


def test_a_conversation_with_results_of_tools(tmp_path: Path) -> None:
    """What came out goes in again, as clients do it, and the model sees it as it wrote it."""
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            said: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
            first = await client.responses.create(
                model=MODEL,
                instructions="Be brief.",
                input=said,
                tools=[CALL, PLUS],
                extra_body={"seed": 0},  # type: ignore[list-item]
            )
            said += first.output
            for item in first.output:
                if item.type == "function_call":
                    said.append({"type": "function_call_output", "call_id": item.call_id, "output": "rain"})
            await client.responses.create(
                model=MODEL,
                instructions="Be brief.",
                input=said,
                tools=[CALL, PLUS],
                extra_body={"seed": 0},  # type: ignore[list-item]
            )
        prompts = [model.decode(list(s.prompt)) for node in stack.nodes for s in node.submits]
        prompt = max(prompts, key=len)
        assert "Be brief." in prompt
        assert prompt.endswith(
            "<|user|>Weather?<|end|><|assistant|><think>Let me see.</think>One moment."
            f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>'
            '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|end|>'
            "<|user|><tool_response>rain</tool_response><|end|>"
            "<|user|><tool_response>rain</tool_response><|end|><|assistant|>"
        )

    with_model(model, [SAID], body)


def test_structured_output_and_required_calls(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            parsed = await client.responses.parse(
                model=MODEL, input="An event?", text_format=Event, extra_body={"seed": 0}
            )
            assert parsed.output_parsed == Event(name="x", day=3)
            async with client.responses.stream(
                model=MODEL, input="An event?", text_format=Event, extra_body={"seed": 0}
            ) as stream:
                final = await stream.get_final_response()
            assert final.output_parsed == Event(name="x", day=3)
            tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
            calls = await client.responses.parse(
                model=MODEL,
                input="Weather?",
                tools=[tool],
                tool_choice="required",
                extra_body={"seed": 1},
            )
            arguments = [item.parsed_arguments for item in calls.output if item.type == "function_call"]
            assert arguments == [GetWeather(city="K")]
        demands = [s.sampling.grammar for node in stack.nodes for s in node.submits]
        assert all(demands)

    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K", "days": []}}\n</tool_call>'
    with_model(model, ['{"name": "x", "day": 3}', call], body)


def test_what_is_cut_is_incomplete_and_log_probabilities_are_shown(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            asked: Any = {"model": MODEL, "input": "x", "max_output_tokens": 3, "top_logprobs": 2}
            asked |= {"include": ["message.output_text.logprobs"], "temperature": 0.5, "metadata": {"a": "b"}}
            cut = await client.responses.create(**asked, extra_body={"seed": 0})
            assert (cut.status, cut.metadata, cut.temperature) == ("incomplete", {"a": "b"}, 0.5)
            assert cut.incomplete_details is not None
            assert cut.incomplete_details.reason == "max_output_tokens"
            part: Any = cut.output[0].content[0]  # type: ignore[union-attr,index]
            assert "".join(entry.token for entry in part.logprobs) == part.text == cut.output_text
            assert [len(entry.top_logprobs) for entry in part.logprobs] == [2, 2, 2]
            events = [
                e async for e in await client.responses.create(**asked, stream=True, extra_body={"seed": 0})
            ]
            assert events[-1].type == "response.incomplete"
            assert [
                entry.token for e in events if e.type == "response.output_text.delta" for entry in e.logprobs
            ] == [entry.token for entry in part.logprobs]

    with_model(model, ["One moment, and then some more."], body)


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"store": True}, "store", "stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "c"}, "conversation", "stores no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "stores no responses"),
        ({"background": True}, "background", "nothing is stored"),
        ({"truncation": "auto"}, "truncation", "never cut"),
        ({"include": ["file_search_call.results"]}, "include", "file_search_call.results"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": []}, "input", ""),
        ({"tools": [CALL, {"type": "custom", "name": "x"}]}, "tools", "custom"),
        (
            {"tools": [CALL], "tool_choice": ONLY | {"tools": [{"type": "function", "name": "x"}]}},
            "tool_choice",
            "x",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "send the item itself"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input", "of the type 'input_image' are not"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": [IMAGE]}]},
            "input",
            "of the type 'input_image' are not",
        ),
        ({"reasoning": {"mode": "pro"}}, "reasoning", "standard"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "call_id"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "maximum context length"),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "frog"}}}}, "text.format", ""),
        ({"frogs": 1}, "frogs", "unknown parameter"),
        ({"model": "other"}, "model", "does not exist"),
    ],
)
def test_what_is_refused_says_why(tmp_path: Path, body: dict[str, Any], param: str, why: str) -> None:
    async def ask(stack: Stack) -> None:
        async with stack.http() as client:
            answer = await client.post(PATH, json={"input": "x"} | body)
            assert answer.status_code == (404 if param == "model" else 400), answer.text
            error = answer.json()["error"]
            assert error["param"] == param
            assert why in error["message"]

    with_model(scripted_model(tmp_path, QWEN), ["x"], ask)


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_fails_says_so_as_clients_know_it(tmp_path: Path, begun: bool) -> None:
    """`begun`: with some of its output; else there was nothing yet but a sign of life."""

    async def body(stack: Stack) -> None:
        (node,) = stack.nodes
        node.held = not begun
        events: list[Any] = []

        async def failing() -> None:
            await stack.until(lambda: len(events) > 4 if begun else stack.dispatcher.router.live == 1)
            node.held = True
            await asyncio.sleep(0.3)
            stack.stop()  # its client cannot go on elsewhere: it said that it takes no ids

        ends = asyncio.create_task(failing())
        async with stack.openai() as client:
            asked: Any = {"model": MODEL, "input": "x", "extra_body": {"seed": 0}}
            options = {"stream_options": {"include_event_ids": False}}
            async with client.responses.stream(**asked | {"extra_body": {"seed": 0} | options}) as stream:
                async for event in stream:
                    events.append(event)
        await ends
        error, failed = events[-2:]
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        assert (len(events) > 4) is begun
        assert (error.type, error.code, error.param) == ("error", "server_error", None)
        assert "shutting down" in error.message
        assert (failed.type, failed.response.status) == ("response.failed", "failed")
        assert (failed.response.error.code, failed.response.error.message) == (error.code, error.message)
        assert failed.response.id == events[0].response.id
        numbers = [event.sequence_number for event in events]
        assert numbers == sorted(set(numbers))

    with_model(scripted_model(tmp_path, QWEN), ["A" * 2000], body, nodes=1, keep_alive_s=0.1)


def test_penalties_reach_the_sampler(tmp_path: Path) -> None:
    async def ask(stack: Stack) -> None:
        async with stack.http() as client:
            told = {"presence_penalty": 0.5, "frequency_penalty": -1.5}
            answer = await client.post(PATH, json={"input": "x", "seed": 0} | told)
            assert answer.status_code == 200, answer.text
            assert {name: answer.json()[name] for name in told} == told
            (submit,) = [submit for node in stack.nodes for submit in node.submits]
            assert (submit.sampling.presence_penalty, submit.sampling.frequency_penalty) == (0.5, -1.5)
            refused = await client.post(PATH, json={"input": "x", "presence_penalty": 3})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "presence_penalty")

    with_model(scripted_model(tmp_path, QWEN), ["Yes."], ask)


def test_only_some_of_the_tools(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            asked: Any = {"model": MODEL, "input": "How is the weather?", "tools": [CALL, PLUS]}
            response = await client.responses.create(**asked, tool_choice=ONLY, extra_body={"seed": 0})
            # A model that calls what it was not told of is not kept from it.
            assert output_of(response) == OUTPUT
            told = model.decode(list(stack.nodes[0].submits[-1].prompt))
            assert ("get_weather" in told, '"add"' in told) == (True, False)
            assert response.tool_choice.model_dump(exclude_none=True) == ONLY

    with_model(model, [SAID], body, nodes=1)


def test_what_says_nothing_is_taken(tmp_path: Path) -> None:
    async def ask(stack: Stack) -> None:
        nothing = {
            "store": False,
            "previous_response_id": None,
            "background": False,
            "truncation": "disabled",
        }
        nothing |= {
            "include": [],
            "metadata": {},
            "user": "u",
            "service_tier": "auto",
            "prompt_cache_key": "k",
        }
        nothing |= {"client_metadata": {"x-codex": "1"}}
        nothing |= {
            "text": {"format": {"type": "text"}, "verbosity": "low"},
            "reasoning": {"summary": "auto", "effort": "max", "context": "auto", "mode": "standard"},
            "max_tool_calls": 3,
        }
        async with stack.http() as client:
            answer = await client.post(PATH, json={"input": "x", "seed": 0} | nothing)
            assert answer.status_code == 200, answer.text
            assert answer.json()["output"][0]["content"][0]["text"] == "Yes."
            assert answer.json()["max_tool_calls"] == 3
            assert (answer.json()["presence_penalty"], answer.json()["frequency_penalty"]) == (0, 0)
            assert answer.json()["completed_at"] is None

    with_model(scripted_model(tmp_path, QWEN), ["Yes."], ask)


def joined(events: Sequence[tuple[str, str]]) -> tuple[list[str], str]:
    """Texts by item, and the final output."""
    texts: dict[int, str] = {}
    output = ""
    for _, data in events:
        if data == "[DONE]":
            continue
        event = json.loads(data)
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
        if event["type"] == "response.completed":
            output = json.dumps(event["response"])
    return [texts[at] for at in sorted(texts)], output


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("burst", [1, 4])
def test_a_stream_goes_on_at_another_gateway_after_any_event(
    tmp_path: Path, burst: int, logprobs: bool
) -> None:
    """Log probabilities of all of it are told at the end, and a log has none."""
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        request = {"model": MODEL, "input": "x", "tools": [CALL, PLUS], "seed": 0, "stream": True}
        if logprobs:
            request["top_logprobs"] = 2
        async with beside(stack) as other, stack.http() as client, other.http() as client2:
            whole = await read(client, "POST", PATH, request)
            texts, output = joined(whole)
            assert texts == ["Let me see.", "One moment.", WEATHER, "{}"]
            told = json.loads(output)["output"][1]["content"][0]["logprobs"]
            assert ("".join(entry["token"] for entry in told) == "One moment.") is logprobs
            numbers = [json.loads(data)["sequence_number"] for _, data in whole if data != "[DONE]"]
            assert numbers == sorted(set(numbers))
            ids = [event_id for event_id, _ in whole]
            ends = [at for at in range(len(ids) - 1) if ids[at] and ids[at] != ids[at + 1]]
            assert len(ends) > 8
            for at in ends:
                rest = await read(client2, "POST", PATH, request, last_event_id=ids[at])
                assert joined([*whole[: at + 1], *rest]) == (texts, output), f"after event {at}"

    with_model(model, [SAID], body, burst=burst)


def test_a_stream_is_taken_up_without_its_body(tmp_path: Path) -> None:
    """What a gateway needs beside the log is kept with it, a schema's own words included."""

    async def body(stack: Stack) -> None:
        schema = {"type": "json_schema", "name": "event", "schema": Event.model_json_schema(), "strict": True}
        request = {
            "input": "x",
            "seed": 0,
            "stream": True,
            "text": {"format": schema},
            "instructions": "Be brief.",
        }
        async with beside(stack) as other, stack.http() as client, other.http() as client2:
            whole = await read(client, "POST", PATH, request)
            stream = whole[0][0].partition(".")[0]
            again = await read(client2, "GET", f"/v1/streams/{stream}")
            assert joined(again) == joined(whole)
            assert json.loads(joined(again)[1])["text"] == {"format": schema}

    with_model(scripted_model(tmp_path, QWEN), ['{"name": "x", "day": 3}'], body)


def test_a_repeated_request_is_answered_the_same(tmp_path: Path) -> None:
    async def ask(stack: Stack) -> None:
        async with stack.http() as client:
            body = {"input": "x", "seed": 0}
            answers = [await client.post(PATH, json=body, headers={"idempotency-key": "k"}) for _ in range(2)]
            assert answers[0].json() == answers[1].json()
            other = await client.post(
                PATH, json=body | {"instructions": "y"}, headers={"idempotency-key": "k"}
            )
            assert other.status_code == 422

    with_model(scripted_model(tmp_path, QWEN), ["Yes."], ask)


LONG: dict[str, Any] = {"input": "x", "seed": 0, "max_output_tokens": 600, "top_logprobs": 20}


def test_log_probabilities_leave_in_pieces_and_count_as_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last events tell all of them four times, and they are kept until then."""
    model = scripted_model(tmp_path, QWEN)
    sizes: list[int] = []
    held: list[int] = []
    write = GenerationResponse._write

    async def noted(response: GenerationResponse, send: Send, data: bytes, more: bool = True) -> None:
        sizes.append(len(data))
        held.append(response._hold.size)
        await write(response, send, data, more)

    monkeypatch.setattr(GenerationResponse, "_write", noted)

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            events = await read(client, "POST", PATH, LONG | {"stream": True})
            whole = await client.post(PATH, json=LONG)
        last = json.loads(events[-2][1])["response"]
        entries = last["output"][0]["content"][0]["logprobs"]
        assert len(entries) > 500
        assert entries == whole.json()["output"][0]["content"][0]["logprobs"]
        size = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False))
        done = [json.loads(data) for _, data in events[-5:-1]]
        assert [event["type"].removeprefix("response.") for event in done] == [
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "incomplete",
        ]
        assert entries == done[0]["logprobs"] == done[1]["part"]["logprobs"]
        assert [event_id for event_id, _ in events[-5:-2]] == [events[-6][0]] * 3 != [events[-2][0]] * 3
        assert max(sizes) <= 2 * PIECE_BYTES < size
        assert size < max(held) < 2 * size

    with_model(model, ["A" * 2000], body)


def test_log_probabilities_that_nobody_has_room_for_end_their_stream(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        memory = stack.service.memory = Memory(400_000, 0.5)
        async with stack.http() as client:
            events = await read(client, "POST", PATH, LONG | {"stream": True})
        told, failed = json.loads(events[-3][1]), json.loads(events[-2][1])
        assert (told["type"], told["code"]) == ("error", "invalid_prompt")
        assert "keep" in told["message"]
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"] == {"code": "invalid_prompt", "message": told["message"]}
        await stack.until(lambda: memory.total == 0)

    with_model(scripted_model(tmp_path, QWEN), ["A" * 2000], body)


def test_an_item_with_many_log_probabilities_may_be_followed_by_others(tmp_path: Path) -> None:
    """What was taken together with its end is written after it."""
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        request = LONG | {"tools": [CALL, PLUS], "stream": True, "max_output_tokens": 900}
        async with beside(stack) as other, stack.http() as client, other.http() as client2:
            whole = await read(client, "POST", PATH, request)
            texts, output = joined(whole)
            assert texts == ["A" * 300, WEATHER, "{}"]
            ids = [event_id for event_id, _ in whole]
            ends = [at for at in range(len(ids) - 1) if ids[at] and ids[at] != ids[at + 1]]
            for at in (*ends[:2], *ends[-12:]):
                rest = await read(client2, "POST", PATH, request, last_event_id=ids[at])
                assert joined([*whole[: at + 1], *rest]) == (texts, output), f"after event {at}"

    calls = SAID[SAID.index("<tool_call>") :]
    with_model(model, ["A" * 300 + calls], body, burst=64)
