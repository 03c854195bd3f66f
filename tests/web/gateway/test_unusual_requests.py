"""Requests that are unusual and valid, as users of other engines report them: OpenAI's reference says what they mean,
and where it is silent vLLM's server does. What other tests have is not here again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controlplane.contract.requests import Sampling, Submit
from tests.web.gateway.fake_node import reference
from tests.web.gateway.scripted import QWEN, says, scripted_model
from tests.web.gateway.stack import Stack, demo_model, stream, with_stack
from web.gateway.openai.requests import INT64_MAX
from web.gateway.openai.sampling import TOP_P_MIN
from web.gateway.text.template import ChatTemplate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": [400, 401], "max_tokens": 3},
    CHAT: {"messages": [USER], "max_tokens": 3},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


async def submitted(stack: Stack, path: str, request: dict[str, Any]) -> Submit:
    """What a scheduler gets of it; the answer is 200."""
    before = [len(node.submits) for node in stack.nodes]
    async with stack.http() as client:
        answer = await client.post(path, json=request)
    assert answer.status_code == 200, (request, answer.text)
    (submit,) = [s for node, had in zip(stack.nodes, before, strict=True) for s in node.submits[had:]]
    return submit


SAMPLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"top_p": 0}, {"top_p": TOP_P_MIN}),
    ({"temperature": 0, "top_p": 0}, {"temperature": 0.0, "top_p": TOP_P_MIN}),
    ({"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1}, {"temperature": 2.0, "top_k": 0, "min_p": 1.0}),
    ({"seed": -1}, {"seed": INT64_MAX}),
    ({"seed": INT64_MAX}, {"seed": INT64_MAX}),
    ({"seed": -INT64_MAX - 1}, {"seed": 0}),
    ({"ignore_eos": True, "stop_token_ids": [400, 400, 7]}, {"stop_token_ids": (400, 7)}),
    ({"logit_bias": {str(t): -100 for t in range(2048)}}, {"logit_bias": tuple((t, -100.0) for t in range(2048))}),
    ({"n": 1.0, "max_tokens": 2.0}, {"max_tokens": 2}),
    ({"frequency_penalty": -2, "presence_penalty": 2}, {"frequency_penalty": -2.0, "presence_penalty": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_values_at_their_ends_reach_the_scheduler(path: str) -> None:
    async def body(stack: Stack) -> None:
        for more, wanted in SAMPLED:
            sampling = (await submitted(stack, path, BODIES[path] | more)).sampling
            assert {name: getattr(sampling, name) for name in wanted} == wanted, more

    with_stack(body)


SAYS_NOTHING: dict[str, list[dict[str, Any]]] = {
    COMPLETIONS: [
        dict.fromkeys(("n", "best_of", "echo", "logprobs", "suffix", "stop", "logit_bias", "user", "temperature"
                       , "top_p", "stream", "stream_options", "response_format", "model")),
        {"suffix": "", "best_of": 1, "min_tokens": 0, "logit_bias": {}, "include_stop_str_in_output": True},
        {"typical_p": 1.0, "mirostat": 0, "top_a": 0, "repeat_penalty": 1.0, "grammar": "", "cache_prompt": True},
        {"anything": None, "stream_options": {"anything": None}, "structured_outputs": None},
    ],
    CHAT: [
        dict.fromkeys(("n", "logprobs", "top_logprobs", "stop", "logit_bias", "user", "temperature", "top_p"
                       , "stream", "stream_options", "response_format", "tools", "tool_choice", "functions"
                       , "function_call", "reasoning_effort", "metadata", "store", "service_tier", "model")),
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tool_choice": "auto", "parallel_tool_calls": False},
        {"max_tokens": None, "max_completion_tokens": 3},
        {"max_tokens": 2000, "max_completion_tokens": 3},
        {"logprobs": False, "top_logprobs": 0},
        {"anything": None, "response_format": {"type": "text", "json_schema": None, "schema": None}},
        {"usage": {"include": True}, "keep_alive": "5m", "provider": {}, "options": {}, "extra_body": {}, "rid": "r"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_says_nothing_changes_nothing(path: str) -> None:
    async def body(stack: Stack) -> None:
        def asked(submit: Submit) -> tuple[tuple[int, ...], Sampling]:
            return submit.prompt, submit.sampling

        plain = BODIES[path] | {"seed": 5}
        wanted = asked(await submitted(stack, path, plain))
        for more in SAYS_NOTHING[path]:
            assert asked(await submitted(stack, path, plain | more)) == wanted, more

    with_stack(body)


SAME: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    # An assistant that has said nothing, in each way that clients write it.
    ([USER, {"role": "assistant", "content": None}, USER], [USER, {"role": "assistant", "content": ""}, USER]),
    ([USER, {"role": "assistant"}, USER], [USER, {"role": "assistant", "content": []}, USER]),
    ([USER, {"role": "assistant", "tool_calls": []}, USER], [USER, {"role": "assistant", "content": ""}, USER]),
    ([USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
     [USER, {"role": "assistant", "content": "No."}, USER]),
    ([USER, {"role": "assistant", "content": "a", "refusal": None, "audio": None, "annotations": []}, USER],
     [USER, {"role": "assistant", "content": "a"}, USER]),
    ([USER, {"role": "assistant", "content": "a", "id": "m", "annotations": [{"type": "url_citation"}],
             "reasoning_details": [{"type": "t"}], "parsed": {"a": 1}, "provider_specific_fields": {"p": 1}}, USER],
     [USER, {"role": "assistant", "content": "a"}, USER]),
    ([{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], [USER]),
    ([USER, {"role": "assistant", "content": [{"type": "output_text", "text": "a", "refusal": None}]}, USER],
     [USER, {"role": "assistant", "content": "a"}, USER]),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
      {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": t} for t in ("4", "2")]}],
     [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "4\n2"}]),
    ([{"role": "developer", "content": "Be brief."}, USER], [{"role": "system", "content": "Be brief."}, USER]),
]  # fmt: skip


def test_messages_that_mean_the_same() -> None:
    async def body(stack: Stack) -> None:
        for one, other in SAME:
            prompts = [
                (await submitted(stack, CHAT, {"messages": said, "max_tokens": 1})).prompt
                for said in (one, other)
            ]
            assert prompts[0] == prompts[1], one

    with_stack(body)


CALLED: list[tuple[dict[str, Any], str]] = [
    ({"arguments": '{"a": [1, null]}'}, '{"a": [1, null]}'),
    ({"arguments": {"a": [1, None]}}, '{"a": [1, null]}'),  # as Ollama's clients have it
    ({"arguments": {}, "parsed_arguments": {"a": 1}}, "{}"),
    ({"arguments": ""}, "{}"),
    ({"arguments": "null"}, "{}"),
    ({"arguments": None}, "{}"),
    ({}, "{}"),
    ({"arguments": '{"a": "'}, '"{\\"a\\": \\""'),  # cut at max_tokens
    ({"arguments": '{"a": "\\ud83d\\ude00"}'}, '{"a": "😀"}'),
    ({"arguments": '{"a": "b \\ud83d"}'}, '{"a": "b \ufffd"}'),  # cut within an emoji: this was a 500
    ({"arguments": '{"\\ude00": 1}'}, '{"\ufffd": 1}'),
]


def test_calls_as_clients_send_them_back(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)

    async def body(stack: Stack) -> None:
        for more in ({"type": "function"}, {"type": None}, {"index": 0, "cache_control": {}}):
            for arguments, shown in CALLED:
                call = {"id": "c1", "function": {"name": "f"} | arguments} | more
                said = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
                prompt = (await submitted(stack, CHAT, {"messages": said, "max_tokens": 1})).prompt
                wanted = f'{{"name": "f", "arguments": {shown}}}\n</tool_call>'
                assert wanted in model.decode(list(prompt)), arguments

    with_stack(body, model=model)


WRITTEN: list[tuple[str, str, str]] = [  # by the model: a call's name and its arguments
    ('{"name": "f", "arguments": {"a": "\\ud83d"}}', "f", '{"a": "\\ud83d"}'),
    ('{"name": "f\\ud83d", "arguments": {}}', "f\ufffd", "{}"),  # this was a 500 at the end of the answer
    ('{"name": "\\ud83d\\ude00", "arguments": {}}', "😀", "{}"),
    ('{"name": "f", "arguments": null}', "f", "{}"),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "f", '{"a": 1}'),
]


def test_calls_that_models_write(tmp_path: Path) -> None:
    model = scripted_model(tmp_path, QWEN)
    tools = [{"function": {"name": "f", "strict": None, "anything": None}, "anything": None}]

    async def body(stack: Stack) -> None:
        for text, name, arguments in WRITTEN:
            for node in stack.nodes:
                node.speak = says(model, f"<tool_call>{text}</tool_call>")
            async with stack.http() as client:
                answer = await client.post(CHAT, json={"messages": [USER], "tools": tools, "seed": 0})
            assert answer.status_code == 200, text
            (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
            assert call["function"] == {"name": name, "arguments": arguments}

    with_stack(body, model=model)


def test_several_system_messages_all_reach_the_model() -> None:
    async def body(stack: Stack) -> None:
        said = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.")]
        request = {"messages": [said[0], USER, said[1], USER], "max_tokens": 1}
        text = demo_model().decode(list((await submitted(stack, CHAT, request)).prompt))
        assert text.index("Be brief.") < text.index("Be kind.")

    with_stack(body)


SYSTEM_ONLY = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.role }}:{{ m.content }};{% endif %}"
    "{% endfor %}"
)
KNOWS_BOTH = SYSTEM_ONLY.replace("'system',", "'system', 'developer',")


@pytest.mark.parametrize(("source", "role"), [(SYSTEM_ONLY, "system"), (KNOWS_BOTH, "developer")])
def test_a_template_without_developers_takes_them_for_the_system(source: str, role: str) -> None:
    """It would pass over what they say, or refuse it."""
    model = replace(demo_model(), template=ChatTemplate(source, {}, 10_000))

    async def body(stack: Stack) -> None:
        request = {"messages": [{"role": "developer", "content": "Be brief."}, USER], "max_tokens": 1}
        prompt = (await submitted(stack, CHAT, request)).prompt
        assert model.decode(list(prompt)) == f"{role}:Be brief.;user:x;"

    with_stack(body, model=model)


def test_choices_of_a_streamed_chat_with_usage() -> None:
    """Each begins with its role and ends once; the usage comes alone, after all of them."""

    async def body(stack: Stack) -> None:
        request = BODIES[CHAT] | {
            "n": 3,
            "seed": 5,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        async with stack.http() as client:
            events = await stream(client, request | {"stream_options": {"include_usage": True}}, CHAT)
            silent = await stream(client, request | {"stream_options": {}}, CHAT)
        *chunks, last = events.chunks
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 9)
        assert all(chunk["usage"] is None for chunk in chunks)
        assert all("usage" not in chunk for chunk in silent.chunks)
        (prompt,) = {submit.prompt for node in stack.nodes for submit in node.submits}
        for index in range(3):
            own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert ["role" in c["delta"] for c in own[1:]] == [False] * len(own[1:])
            assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
            assert events.ids(index) == reference(prompt, 5 + index, 3)

    with_stack(body)


ANSWERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "", "max_tokens": 1}, {"prompt_tokens": 1}),  # the tokenizer's beginning
    (COMPLETIONS, {"prompt": "\u0000", "max_tokens": 1}, {"prompt_tokens": 2}),
    (COMPLETIONS, {"prompt": "x", "echo": True, "max_tokens": 0}, {"prompt_tokens": 2, "completion_tokens": 0}),
    (COMPLETIONS, {"prompt": ["a", "b"], "echo": True, "n": 2, "max_tokens": 1}, {"completion_tokens": 4}),
    (COMPLETIONS, {"prompt": [[400], [401, 402]], "max_tokens": 1}, {"prompt_tokens": 3}),
]  # fmt: skip


def test_what_is_counted() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for path, request, wanted in ANSWERS:
                usage = (await client.post(path, json=request)).json()["usage"]
                assert {name: usage[name] for name in wanted} == wanted, request
            assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == [0]
            plain = {"prompt": "", "add_special_tokens": False}
            assert (await client.post("/tokenize", json=plain)).json()["tokens"] == []
            assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}

    with_stack(body)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"stop": ""}, "stop"),
    (COMPLETIONS, {"seed": 2**64 - 1}, "seed"),
    (COMPLETIONS, {"stop_token_ids": [2**70]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": [[400], "a"]}, "prompt"),
    (COMPLETIONS, {"top_p": 1.1}, "top_p"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"tools": [], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "refusal", "text": "No."}]}]}, "messages"),
]


def test_what_has_no_meaning_is_refused_by_name() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for path, more, name in REFUSED:
                answer = await client.post(path, json=BODIES[path] | more)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), more
        assert not any(node.submits for node in stack.nodes)

    with_stack(body)
