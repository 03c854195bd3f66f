"""Tools and reasoning over HTTP: with the openai client, and across gateways at every event."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from tests.web.gateway.scripted import LLAMA, MISTRAL, PYTHONIC, QWEN, REASONER, joined, says, scripted_model
from tests.web.gateway.stack import MODEL, Stack, beside, running
from tests.web.gateway.test_resume import read
from web.gateway.model import Model

CHAT = "/v1/chat/completions"


class GetWeather(pydantic.BaseModel):
    city: str
    days: list[int] = pydantic.Field(default_factory=list)


TOOL = openai.pydantic_function_tool(GetWeather, name="get_weather")
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
ADD: Any = {"type": "function", "function": {"name": "add", "strict": True, "parameters": NOTHING}}
ASK: Any = [{"role": "user", "content": "How is the weather?"}]
WEATHER = '{"city": "Köln", "days": [1, 2]}'
CALLS = {
    QWEN: '<think>\nLet me see.\n</think>\n\nOne moment.\n<tool_call>\n{"name": "get_weather", "arguments": '
    f"{WEATHER}}}\n"
    '</tool_call>\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
    LLAMA: f'{{"name": "get_weather", "parameters": {WEATHER}}}; {{"name": "add", "parameters": {{}}}}',
    PYTHONIC: "[get_weather(city='Köln', days=[1, 2]), add()]",
    MISTRAL: f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "add", "arguments": {{}}}}]',
}


def with_model(
    model: Model, texts: list[str], body: Callable[[Stack], Awaitable[None]], **knobs: Any
) -> None:
    async def run() -> None:
        async with running(model=model, speak=says(model, *texts), **knobs) as stack, asyncio.timeout(150):
            await body(stack)

    asyncio.run(run())


@pytest.mark.parametrize("template", CALLS, ids=["qwen", "llama", "pythonic", "mistral"])
def test_calls_of_each_family(tmp_path: Path, template: str) -> None:
    """The same of an answer in one piece, of raw chunks, and of the client's own streaming helper."""
    model = scripted_model(tmp_path, template)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            asked: Any = {"model": MODEL, "messages": ASK, "tools": [TOOL, ADD], "seed": 0}
            answer = (await client.chat.completions.create(**asked)).choices[0]
            assert answer.finish_reason == "tool_calls"
            calls = answer.message.tool_calls
            assert calls is not None
            assert [(c.function.name, c.function.arguments) for c in calls] == [
                ("get_weather", WEATHER),
                ("add", "{}"),
            ]
            assert len({call.id for call in calls}) == 2
            assert {len(call.id) for call in calls} == {9 if template == MISTRAL else 29}
            assert answer.message.content == ("One moment." if template == QWEN else None)
            reasoning = getattr(answer.message, "reasoning_content", None)
            assert reasoning == ("Let me see." if template == QWEN else None)
            named: list[str] = []
            async with client.chat.completions.stream(**asked) as stream:
                async for event in stream:
                    if event.type == "tool_calls.function.arguments.done":
                        named.append(event.name)
                final = (await stream.get_final_completion()).choices[0]
            assert named == ["get_weather", "add"]
            assert final.finish_reason == "tool_calls"
            assert (final.message.content or None) == answer.message.content
            streamed = final.message.tool_calls
            assert streamed is not None
            assert [(c.function.name, c.function.arguments) for c in streamed] == [
                (c.function.name, c.function.arguments) for c in calls
            ]
            assert streamed[0].function.parsed_arguments == GetWeather(city="Köln", days=[1, 2])
            parsed = await client.chat.completions.parse(**asked)
            first = parsed.choices[0].message.tool_calls
            assert first is not None
            assert first[0].function.parsed_arguments == GetWeather(city="Köln", days=[1, 2])

    with_model(model, [CALLS[template]], body, burst=3)


def test_a_conversation_goes_on(tmp_path: Path) -> None:
    """What the client was given goes back to the model as its template wants it."""
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:
            first = await client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], seed=0)
            said = first.choices[0].message
            assert said.tool_calls
            back: Any = said.model_dump()
            answers: Any = [
                {"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in said.tool_calls
            ]
            again = await client.chat.completions.create(
                model=MODEL, messages=[*ASK, back, *answers], tools=[TOOL], seed=1
            )
            assert again.choices[0].message.content == "It rains."
            assert again.choices[0].finish_reason == "stop"
            prompt = model.decode(list(stack.nodes[0].submits[-1].prompt))
            assert "<think>Let me see.</think>One moment." in prompt
            assert f'{{"name": "get_weather", "arguments": {WEATHER}}}' in prompt
            assert prompt.count("<tool_response>rain</tool_response>") == 2
            assert '{"type": "function", "function": {"name": "get_weather", ' in prompt
            assert "strict" not in prompt

    with_model(model, [CALLS[QWEN], "It rains."], body, nodes=1)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_some_of_the_tools(tmp_path: Path) -> None:
    """The model is told of these, and a call that it must make is one of them."""
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for mode in ("auto", "required"):
                asked = {
                    "messages": ASK,
                    "tools": [TOOL, ADD],
                    "tool_choice": allowed(mode, "add"),
                    "seed": 0,
                }
                answer = await client.post(CHAT, json=asked)
                assert answer.status_code == 200, answer.text
                (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
                assert call["function"] == {"name": "add", "arguments": "{}"}
                submit = stack.nodes[0].submits[-1]
                assert "get_weather" not in model.decode(list(submit.prompt)) + submit.sampling.grammar
                assert ('"add"' in submit.sampling.grammar.replace("\\", "")) == (mode == "required")

    with_model(model, ['<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'], body, nodes=1)


def test_tool_choice(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'

    async def body(stack: Stack) -> None:
        async with stack.http() as client:

            async def ask(**more: Any) -> Any:
                answer = await client.post(CHAT, json={"messages": ASK, "tools": [ADD]} | more)
                return answer.status_code, answer.json()

            status, answer = await ask(tool_choice="none")
            assert (status, answer["choices"][0]["message"]["content"]) == (200, call)
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert "# Tools" not in model.decode(list(stack.nodes[0].submits[-1].prompt))
            status, answer = await ask(tool_choice="auto")
            assert (status, answer["choices"][0]["finish_reason"]) == (200, "tool_calls")
            assert "# Tools" in model.decode(list(stack.nodes[0].submits[-1].prompt))
            one = {"type": "function", "function": {"name": "add"}}
            for choice, why in [
                ({"type": "function", "function": {"name": "sub"}}, "no tool has the name 'sub'"),
                ("sometimes", "tool_choice"),
                ({"type": "function"}, "tool_choice"),
                (allowed("auto", "sub"), "no tool has the name 'sub'"),
                (allowed("never", "add"), "tool_choice"),
                (allowed("auto"), "tool_choice"),
            ]:
                status, answer = await ask(tool_choice=choice)
                assert (status, why in answer["error"]["message"]) == (400, True), answer
            for tools, choice, why in [
                ([], "required", "required needs tools"),
                ([], one, "no tool has the name 'add'"),
                ([ADD, ADD], "auto", "two functions with the name 'add'"),
                ([{"type": "function", "function": {"name": "a b"}}], "auto", "tools"),
                (
                    [{"type": "web_search"}],
                    "auto",
                    "tools of the type 'web_search' are not supported, only function",
                ),
                ([{"type": "custom", "custom": {"name": "x"}}], "auto", "tools of the type 'custom'"),
                ([ADD] * 129, "auto", "tools"),
            ]:
                status, answer = await ask(tools=tools, tool_choice=choice)
                assert (status, why in answer["error"]["message"]) == (400, True), answer

    with_model(model, [call], body, nodes=1)


def test_calls_that_have_to_come(tmp_path: Path) -> None:
    """They are held to a grammar, behind the reasoning; what the schema says of the answer goes into it."""
    model = scripted_model(tmp_path, QWEN)
    tail = '</think>\n\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    one: Any = {"type": "function", "function": {"name": "add"}}

    async def body(stack: Stack) -> None:
        async with stack.openai() as client:

            async def ask(**more: Any) -> tuple[Any, str]:
                answer = await client.chat.completions.create(
                    model=MODEL, messages=ASK, tools=[TOOL, ADD], seed=0, **more
                )
                return answer.choices[0], stack.nodes[0].submits[-1].sampling.grammar

            choice, grammar = await ask(tool_choice="required")
            assert (choice.finish_reason, choice.message.tool_calls[0].function.name) == ("tool_calls", "add")
            assert "get_weather" in grammar
            assert "call)*" in grammar
            assert "thought" in grammar
            choice, grammar = await ask(tool_choice=one, reasoning_effort="none")
            assert (choice.finish_reason, choice.message.tool_calls[0].function.name) == ("stop", "add")
            assert "get_weather" not in grammar
            assert "call)*" not in grammar
            assert "thought" not in grammar, "the prompt says that the model has thought"
            assert "# Tools" in model.decode(list(stack.nodes[0].submits[-1].prompt))
            _, grammar = await ask(tool_choice="required", parallel_tool_calls=False)
            assert "call)*" not in grammar
            for must in (
                "required",
                one,
            ):  # and what an answer would have to be says nothing: there comes none
                _, grammar = await ask(tool_choice=must)
                assert (await ask(tool_choice=must, response_format={"type": "json_object"}))[1] == grammar
            _, grammar = await ask(response_format={"type": "json_object"})
            assert "get_weather" in grammar
            assert "@answer" in grammar
            assert (await ask())[1] == ""
            for more, why in [
                ({"tool_choice": "required", "extra_body": {"guided_choice": ["a"]}}, "give one of them"),
                ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos"),
            ]:
                with pytest.raises(openai.BadRequestError, match=why):
                    await ask(**more)
            broken: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
            with pytest.raises(openai.BadRequestError, match="no object"):
                await client.chat.completions.create(
                    model=MODEL, messages=ASK, tools=[broken], tool_choice="required"
                )

    with_model(model, ["<think>So." + tail], body, nodes=1)


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 1}], ids=["plain", "logprobs"])
def test_one_call_at_a_time(tmp_path: Path, options: dict[str, Any]) -> None:
    """The output ends with the first call: nothing more is computed."""
    model = scripted_model(tmp_path, QWEN)
    whole = len(model.tokenizer.encode(CALLS[QWEN]).ids)

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            asked = {"messages": ASK, "tools": [TOOL, ADD], "parallel_tool_calls": False, "seed": 0} | options
            answer = (await client.post(CHAT, json=asked)).json()
            choice = answer["choices"][0]
            assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["get_weather"]
            assert choice["message"]["tool_calls"][0]["function"]["arguments"] == WEATHER
            assert choice["finish_reason"] == "tool_calls"
            assert answer["usage"]["completion_tokens"] < whole - 10
            await stack.until(lambda: not stack.nodes[0].running)
            assert stack.nodes[0].cancels

    with_model(model, [CALLS[QWEN]], body, nodes=1, step_s=0.01)


@pytest.mark.parametrize("template", [LLAMA, REASONER], ids=["llama", "reasoner"])
def test_reasoning_and_usage(tmp_path: Path, template: str) -> None:
    model = scripted_model(tmp_path, template)
    text = "Hm, so.\n</think>\n\nYes."
    thoughts = len(model.tokenizer.encode("Hm, so.\n</think>", add_special_tokens=False).ids)

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            answer = (await client.post(CHAT, json={"messages": ASK})).json()
            message, usage = answer["choices"][0]["message"], answer["usage"]
            if template == LLAMA:  # it does not reason: the text is what it is
                assert message == {"role": "assistant", "content": text}
                assert "completion_tokens_details" not in usage
                return
            assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, so."}
            # A token may have the end of the reasoning and more.
            assert 0 <= usage["completion_tokens_details"]["reasoning_tokens"] - thoughts <= 1
            assert usage["completion_tokens"] == 1 + len(
                model.tokenizer.encode(text, add_special_tokens=False).ids
            )
            hidden = (await client.post(CHAT, json={"messages": ASK, "include_reasoning": False})).json()
            assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}
            assert hidden["usage"] == usage

    with_model(model, [text], body)


def test_thinking_through_the_template(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            options: list[tuple[dict[str, Any], bool]] = [
                ({}, False),
                ({"enable_thinking": False}, True),
                ({"chat_template_kwargs": {"enable_thinking": False}}, True),
                ({"reasoning_effort": "none"}, True),
                ({"reasoning_effort": "high"}, False),
            ]
            for more, off in options:
                answer = await client.post(CHAT, json={"messages": ASK} | more)
                assert answer.json()["choices"][0]["message"]["content"] == "Yes."
                prompt = model.decode(list(stack.nodes[0].submits[-1].prompt))
                assert prompt.endswith("<think>\n\n</think>\n\n") == off

    with_model(model, ["Yes."], body, nodes=1)


def test_a_model_that_knows_of_no_tools_says_so(tmp_path: Path) -> None:
    def refused(model: Model, why: str) -> None:
        async def body(stack: Stack) -> None:
            async with stack.http() as client:
                for path in (CHAT, "/tokenize"):
                    answer = await client.post(path, json={"messages": ASK, "tools": [ADD]})
                    assert answer.status_code == 400
                    assert why in answer.json()["error"]["message"]
                    assert (await client.post(path, json={"messages": ASK, "tools": []})).status_code == 200

        with_model(model, ["x"], body)

    refused(scripted_model(tmp_path, REASONER), "knows of no tools")
    refused(scripted_model(tmp_path, QWEN, tool_parser="none"), "gateway.tool_parser")
    refused(scripted_model(tmp_path, "{{ tools }}{{ messages[0].content }}"), "gateway.tool_parser")


def test_a_parser_by_setting(tmp_path: Path) -> None:
    model = scripted_model(
        tmp_path, "{{ tools }}{{ messages }}", tool_parser="hermes", reasoning_parser="think"
    )
    assert (model.output.tools, model.output.reasoning) != (None, None)
    model = scripted_model(tmp_path, QWEN, reasoning_parser="none")

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            answer = (await client.post(CHAT, json={"messages": ASK})).json()
            assert answer["choices"][0]["message"]["content"] == "<think>a</think>b"

    with_model(model, ["<think>a</think>b"], body)


# Across gateways


@pytest.mark.parametrize("template", CALLS, ids=["qwen", "llama", "pythonic", "mistral"])
@pytest.mark.parametrize(
    "options", [{}, {"logprobs": True, "return_token_ids": True}], ids=["plain", "logprobs"]
)
def test_a_stream_goes_on_at_another_gateway_wherever_it_was_cut(
    tmp_path: Path, template: str, options: dict[str, Any]
) -> None:
    model = scripted_model(tmp_path, template)
    asked = {
        "model": MODEL,
        "messages": ASK,
        "tools": [TOOL, ADD],
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }

    async def body(one: Stack) -> None:
        async with beside(one) as two, one.http() as first, two.http() as second:
            whole = await read(first, "POST", CHAT, asked)
            want = joined(whole)
            assert want.choices[0].finish == ["tool_calls"]
            assert want.choices[0].names == ["get_weather", "add"]
            assert ("completion_tokens_details" in (want.usage or {})) == (template == QWEN)
            for cut in range(1, len(whole), 2 if template == QWEN and options else 5):
                events = await read(first, "POST", CHAT, asked, limit=cut)
                last = events[-1][0]
                if cut % 4 == 1:
                    rest = await read(second, "POST", CHAT, asked, last_event_id=last)
                else:
                    rest = await read(
                        second, "GET", f"/v1/streams/{last.partition('.')[0]}", last_event_id=last
                    )
                got = joined([*events, *rest])
                assert got == want, cut

    with_model(model, [CALLS[template]], body, step_s=0.0005)


def test_all_choices_go_on(tmp_path: Path) -> None:
    """Some are over, some call tools, some reason; the usage counts the reasoning of those that are over, too."""
    model = scripted_model(tmp_path, QWEN)
    texts = ["<think>So.</think>Yes.", CALLS[QWEN], "<think>" + "so " * 40 + "</think>No."]
    asked = {
        "model": MODEL,
        "messages": ASK,
        "tools": [TOOL, ADD],
        "seed": 0,
        "n": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def body(one: Stack) -> None:
        async with beside(one) as two, one.http() as first, two.http() as second:
            whole = await read(first, "POST", CHAT, asked)
            want = joined(whole)
            assert [want.choices[k].finish for k in range(3)] == [["stop"], ["tool_calls"], ["stop"]]
            for cut in range(5, len(whole), 9):
                events = await read(first, "POST", CHAT, asked, limit=cut)
                last = events[-1][0]
                got = joined([*events, *await read(second, "POST", CHAT, asked, last_event_id=last)])
                assert got == want, cut

    with_model(model, texts, body)


def test_the_same_key_gives_the_same_ids(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)
    asked = {"messages": ASK, "tools": [TOOL, ADD], "seed": 0}

    async def body(one: Stack) -> None:
        async with beside(one) as two, one.http() as first, two.http() as second:
            key = {"idempotency-key": "k"}
            answer = (await first.post(CHAT, json=asked, headers=key)).json()
            again = (await second.post(CHAT, json=asked, headers=key)).json()
            assert answer["choices"] == again["choices"]
            other = (await second.post(CHAT, json=asked)).json()
            ids = {c["id"] for a in (answer, other) for c in a["choices"][0]["message"]["tool_calls"]}
            assert len(ids) == 4

    with_model(model, [CALLS[QWEN]], body)
