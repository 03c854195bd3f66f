"""Every parameter that clients know: ignored if it cannot change the answer, else obeyed or refused by name."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import ChatCompletionContentPartTextParam, ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as of_chat

from tests.web.gateway.stack import running
from web.gateway.errors import ApiError
from web.gateway.openai.messages import TextPart
from web.gateway.openai.requests import (
    IGNORED,
    OTHER_HINTS,
    OTHER_UNSUPPORTED,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
    parse,
)
from web.gateway.openai.responses_request import ResponsesRequest, messages_of
from web.gateway.openai.strict import CACHE_HINTS

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"prompt": "x"}


def accepts(kind: type[Any], body: dict[str, Any]) -> Any:
    return parse(kind, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatRequest, of_chat.CompletionCreateParamsBase),
        (ChatRequest, of_chat.CompletionCreateParamsStreaming),
        (CompletionRequest, of_completions.CompletionCreateParamsBase),
        (CompletionRequest, of_completions.CompletionCreateParamsStreaming),
        (StreamOptions, ChatCompletionStreamOptionsParam),
        (TextPart, ChatCompletionContentPartTextParam),
    ],
)
def test_no_parameter_of_the_openai_client_is_unknown(kind: type[Any], params: type[Any]) -> None:
    known = set(kind.model_fields) | IGNORED | set(UNSUPPORTED) | CACHE_HINTS
    assert set(params.__annotations__) <= known


HINTS: dict[str, list[Any]] = {
    "user": ["u"],
    "metadata": [{"a": "b"}],
    "store": [True, False],
    "service_tier": ["auto", "default", "flex", "priority"],
    "parallel_tool_calls": [True, False],
    "safety_identifier": ["s"],
    "verbosity": ["low", "medium", "high"],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["24h", "in_memory"],
    "prompt_cache_options": [{"mode": "x"}],
    "prediction": [{"type": "content", "content": "x"}],
    "session_id": ["s"],
    "stream_interval": [4],
    "truncation_side": ["left"],
    "media_io_kwargs": [{"image": {}}],
}


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [
        (kind, body, name)
        for kind, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION))
        for name in sorted((IGNORED | OTHER_HINTS) - set(kind.model_fields))
    ],
)
def test_hints_are_ignored(name: str, kind: type[Any], body: dict[str, Any]) -> None:
    plain = accepts(kind, body)
    for value in [*HINTS.get(name, []), None, "x", 1, {"a": [1]}]:
        assert accepts(kind, body | {name: value}) == plain


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [
        (kind, body, name)
        for kind, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION))
        for name in sorted({*UNSUPPORTED, *OTHER_UNSUPPORTED} - set(kind.model_fields))
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    kind: type[Any], body: dict[str, Any], name: str
) -> None:
    plain = accepts(kind, body)
    for neutral in (None, *(UNSUPPORTED | OTHER_UNSUPPORTED)[name]):
        assert accepts(kind, body | {name: neutral}) == plain
    for value in ("something", [{"type": "function"}], 7):
        with pytest.raises(ApiError, match=f"{name} is not supported") as caught:
            accepts(kind, body | {name: value})
        assert (caught.value.status, caught.value.param) == (400, name)


NEUTRAL: dict[str, list[Any]] = {
    "n": [1, None],
    "best_of": [1, None],
    "logit_bias": [{}, None],
    "stop": [[], None],
    "stop_token_ids": [[], None],
    "stream_options": [None, {}, {"include_usage": False}, {"include_obfuscation": False}],
    "response_format": [{"type": "text"}],
    "seed": [None],
    "stream": [False, None],
    "top_k": [0, -1, None],
    "min_p": [0, None],
    "priority": [0, None],
}


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize(("kind", "body"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_defaults_may_be_said(name: str, kind: type[Any], body: dict[str, Any]) -> None:
    for value in NEUTRAL[name]:
        accepts(kind, body | {name: value})


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"top_logprobs": 0},
        CHAT | {"tool_choice": "auto", "tools": []},
        CHAT | {"stream": True, "stream_options": {"include_obfuscation": True, "include_usage": None}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "e"}}]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {}}]}
            ]
        },
        {"messages": [{"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}}]},
        {
            "messages": [
                {"role": "assistant", "content": "x", "reasoning": None, "provider_specific_fields": {}}
            ]
        },
        {"messages": [{"role": "assistant", "content": "x", "parsed": None, "id": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "annotations": None}]}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": []}],
                    "type": "message",
                    "status": "completed",
                    "phase": "final_answer",
                }
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x", "id": "p", "citations": []}]}
            ]
        },
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "x", "annotations": []}]}
            ]
        },
        {
            "messages": [
                {"role": "assistant", "content": "x", "thinking_blocks": [], "images": [], "prefix": False}
            ]
        },
        {
            "messages": [
                {"role": "tool", "content": "x", "status": "success", "is_error": False, "metadata": {}}
            ]
        },
        {"messages": [{"role": "assistant", "refusal": "x"}]},
        {"messages": [{"role": "assistant", "content": None, "refusal": "x"}]},
        {"messages": [{"role": "assistant", "content": "x", "refusal": "No."}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": "x",
                    "tool_calls": [
                        {
                            "id": "c",
                            "function": {"name": "f", "provider_specific_fields": {"s": "x"}},
                            "provider_specific_fields": {},
                            "extra_content": {"google": {"thought_signature": "s"}},
                        }
                    ],
                }
            ]
        },
        CHAT
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {}, "cache_control": {"type": "ephemeral"}},
            }
        },
        CHAT | {"tools": [{"type": "function", "function": {"name": "f"}, "defer_loading": False}]},
    ],
)
def test_what_clients_send_along(body: dict[str, Any]) -> None:
    assert accepts(ChatRequest, body).messages[0].text == "x"


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"stream": True, "stream_options": {"include_obfuscations": True}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}]},
        {"messages": [{"role": "user", "content": "x", "weight": 1}]},
        {"messages": [{"role": "user", "content": "x", "type": "function_call"}]},
        {"messages": [{"role": "assistant", "content": "x", "prefix": True}]},
        {"messages": [{"role": "assistant", "content": "x", "prefix": 0}]},
        {"messages": [{"role": "tool", "content": "x", "is_error": True}]},
        {"messages": [{"role": "assistant", "content": "x", "thinking_blocks": [{"thinking": "y"}]}]},
        CHAT | {"tools": [{"type": "function", "function": {"name": "f"}, "defer_loading": True}]},
        CHAT | {"prompt_cache_keys": "k"},
    ],
)
def test_what_nobody_knows_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="unknown parameter"):
        accepts(ChatRequest, body)


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh"])
def test_a_template_that_knows_of_efforts_is_told(effort: str) -> None:
    request = accepts(ChatRequest, CHAT | {"reasoning_effort": effort})
    said = {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {})
    assert request.template_variables == said
    own = accepts(ChatRequest, CHAT | {"reasoning_effort": effort, "chat_template_kwargs": {"a": 1}})
    assert own.template_variables == said | {"a": 1}
    assert accepts(ChatRequest, CHAT | {"reasoning_effort": None}).template_variables == {}
    with pytest.raises(ApiError, match="reasoning_effort"):
        accepts(ChatRequest, CHAT | {"reasoning_effort": "hardly"})


def test_a_template_is_told_whether_to_think() -> None:
    for body, said in [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False},
        ),
        (
            {"enable_thinking": True, "reasoning_effort": "none"},
            {"enable_thinking": True, "reasoning_effort": "none"},
        ),
    ]:
        assert accepts(ChatRequest, CHAT | body).template_variables == said


OF_OTHER_SERVERS: dict[str, Any] = {
    "cache_control": {"type": "ephemeral"},
    "custom_labels": {"a": "b"},
    "data_parallel_rank": 0,
    "litellm_call_id": "i",
    "n_keep": 0,
    "num_retries": 2,
    "return_cached_tokens_details": False,
    "slot_id": -1,
    "stop_regex": [],
    "tags": ["a"],
    "timeout": 600,
    "trace": {"a": 1},
    "trace_id": "t",
    "user_id": "u",
}


def test_hints_of_other_servers() -> None:
    for kind, body in (
        (ChatRequest, CHAT),
        (CompletionRequest, COMPLETION),
        (ResponsesRequest, {"input": "x"}),
        (TokenizeRequest, {"prompt": "x"}),
        (DetokenizeRequest, {"tokens": [1]}),
    ):
        assert accepts(kind, body | OF_OTHER_SERVERS) == accepts(kind, body)


def test_another_name_of_the_salt() -> None:
    """SGLang's: it decides which requests share a cache, so that it is not passed over."""
    assert accepts(ChatRequest, CHAT | {"extra_key": "k"}) == accepts(ChatRequest, CHAT | {"cache_salt": "k"})
    assert accepts(ChatRequest, CHAT | {"extra_key": None}) == accepts(ChatRequest, CHAT)
    for more in ({"extra_key": "k", "cache_salt": "l"}, {"extra_key": 7}):
        with pytest.raises(ApiError, match=r"extra_key|cache_salt"):
            accepts(ChatRequest, CHAT | more)


def test_items_of_a_response_may_come_back_with_all_they_had() -> None:
    part = {"type": "output_text", "text": "x", "annotations": [{"a": 1}], "logprobs": [], "id": "p"}
    item = {
        "type": "message",
        "role": "assistant",
        "content": [part],
        "created_by": "y",
        "metadata": {"a": "b"},
    }
    body = {
        "input": [item],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "cache_control": {}}},
        "tools": [{"type": "function", "name": "f", "defer_loading": False}],
    }
    assert messages_of(accepts(ResponsesRequest, body))[0].text == "x"


def test_tokenizing_knows_the_same_hints() -> None:
    assert accepts(TokenizeRequest, {"prompt": "x", "request_id": "r"}).prompt == "x"
    assert accepts(TokenizeRequest, {"prompt": "x", "user": "u", "tools": []}).prompt == "x"
    assert accepts(DetokenizeRequest, {"tokens": [1], "prompt_cache_key": "k"}).tokens == [1]


def test_a_hint_does_not_change_what_is_asked() -> None:
    """Over HTTP, to the scheduler."""
    hints = {name: values[0] for name, values in HINTS.items()}

    async def body() -> None:
        async with running() as stack, stack.http() as client, asyncio.timeout(20):
            for path, request in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
                texts = []
                for more in ({}, hints):
                    answer = await client.post(path, json=request | {"seed": 3, "max_tokens": 5} | more)
                    assert answer.status_code == 200, answer.text
                    choice = answer.json()["choices"][0]
                    texts.append(choice.get("text") or choice["message"]["content"])
                assert texts[0] == texts[1]
            submits = [submit for node in stack.nodes for submit in node.submits]
            assert len({(submit.prompt, submit.sampling) for submit in submits}) == 2

    asyncio.run(body())


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_other_codings_of_unicode(coding: str) -> None:
    asked = parse(CompletionRequest, '{"prompt": "é😀", "max_tokens": 1.0}'.encode(coding))
    assert (asked.prompt, asked.max_tokens) == ("é😀", 1)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"prompt":"\xe9"}', "unicode"),
        (b'{"prompt":"\\ud800"}', "hex escape"),
        (b'{"prompt":"a","max_tokens":1.0,"user":"\\ud800"}', "hex escape"),
        (b'{"prompt":' + b"[" * 100_000, "recursion limit"),
        (b'{"prompt":"a","max_tokens":1,}', "trailing comma"),
        (b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", "number"),
        (b"\xff\xfea", "utf-16"),
        (b"", "EOF"),
    ],
)
def test_it_is_said_what_is_wrong_with_the_json(raw: bytes, why: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, raw)
    assert (caught.value.status, why in caught.value.message) == (400, True), caught.value.message
