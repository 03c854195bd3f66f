"""Whatever field a client fills, what that keeps in a gateway or a scheduler is counted: measured, field by field.

Fields are filled by their types, so that one that is new is measured here from the day it is added.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tracemalloc
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from pydantic import BaseModel

from controlplane.contract.requests import Sampling, Submit, Token
from dataplane.core.ngrams import NgramIndex
from dataplane.core.prefix import PrefixHasher
from dataplane.core.request import REQUEST_BYTES, Request
from tests.web.gateway.stack import Stack, with_stack
from web.gateway.openai.chat import prepare_chat
from web.gateway.openai.completions import prepare_completion
from web.gateway.openai.prepared import CHOICE_BYTES, Origin, kept_bytes
from web.gateway.openai.requests import ChatRequest, CompletionRequest
from web.gateway.openai.responses import prepare_responses
from web.gateway.openai.responses_request import ResponsesRequest
from web.gateway.text.choice_decoder import TextRules

COUNT = 2000  # items of each collection
TRIES = 30  # at a measure, until nothing else of the process shows in it
WIDE = "\U0001f600"


def filled(kind: Any, at: int = 0) -> Any:
    """A long value of this type; `at` makes it another one."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return max((filled(part, at) for part in args if part is not NoneType), key=lambda v: len(repr(v)))
    if origin is tuple and args[-1] is Ellipsis:
        return tuple(filled(args[0], at + i) for i in range(COUNT if at == 0 else 4))
    if origin is tuple:
        return tuple(filled(part, at + 1) for part in args)
    if origin is frozenset:
        return frozenset(filled(args[0], i + 1) for i in range(COUNT))
    if origin is not None and issubclass(origin, Mapping):
        return {filled(args[0], i + 1): filled(args[1], i + 1) for i in range(COUNT)}
    if kind is str:
        return WIDE * COUNT if at == 0 else f"text {at}"
    if kind is bytes:
        return bytes(COUNT)
    return {int: 1000 + at, float: 0.5 + at, bool: True}[kind]


def taken(make: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that what `make` returns keeps, and what it returns."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, made
    finally:
        tracemalloc.stop()


def arrived(data: bytes) -> Request:
    return Request.from_submit(msgspec.msgpack.decode(data, type=Submit), 0, 1)


encode = msgspec.msgpack.Encoder().encode


@pytest.mark.parametrize("name", Sampling.__struct_fields__)
def test_a_scheduler_counts_each_field_of_the_sampling(name: str) -> None:
    value = filled(get_type_hints(Sampling)[name])
    sampling = Sampling(**{"max_tokens": 1, "seed": 1, name: 20 if name.endswith("logprobs") else value})
    data = encode(Submit(1, "p0", (5,), sampling, context=b""))
    size, request = taken(lambda: arrived(data))
    assert size <= request.bytes_kept
    assert request.bytes_kept <= 2 * size + REQUEST_BYTES


@pytest.mark.parametrize("name", [n for n in Submit.__struct_fields__ if n != "sampling"])
def test_a_scheduler_counts_each_field_of_a_submit(name: str) -> None:
    fields: dict[str, Any] = {
        "rid": 1,
        "pipeline": "p0",
        "prompt": (5,),
        "sampling": Sampling(1, 1),
        "context": b"",
    }
    data = encode(Submit(**fields | {name: filled(get_type_hints(Submit)[name])}))
    size, request = taken(lambda: arrived(data))
    # While it runs the KV pool bounds its output; when it is over nothing else does.
    assert size <= (request.log_bytes if name == "emitted" else request.bytes_kept)
    assert request.log_bytes <= 2 * size + REQUEST_BYTES


# What becomes long in a Request beside the fields of its Submit.
GROWN: dict[str, Callable[[Request], None]] = {
    "ids": lambda r: r.ids.extend(range(1000, 1000 + len(r.output))),
    "output": lambda r: None,
    "ngrams": lambda r: setattr(r, "ngrams", NgramIndex()) or r.ngrams_after(1),  # type: ignore[func-returns-value]
    "hasher": lambda r: setattr(r, "hasher", PrefixHasher(16)) or r.names,  # type: ignore[func-returns-value]
    "scores": lambda r: r.take_scores(1, bytes(12 * 21 * (r.prompt_len - 1))),
}


def test_the_log_of_a_request_that_is_over_counts_all_that_it_has() -> None:
    short = {int, bool, float, float | None, int | None}
    elsewhere = {"sampling", "context", "salt", "phase"}  # see above
    hints = get_type_hints(Request)
    long = {f.name for f in dataclasses.fields(Request) if hints[f.name] not in short}
    assert long - elsewhere == set(GROWN), "a new field: fill it here, and count it in Request.log_bytes"
    sampling = Sampling(8, 1, logprobs=20, prompt_logprobs=20)
    data = encode(Submit(1, "p0", filled(tuple[int, ...]), sampling, context=b""))

    def made() -> Request:
        request = arrived(data)
        for i in range(300):
            top = tuple((1000 + i + k, 0.5 + i + k) for k in range(20))
            request.output.append(Token(1, 1000 + i, 2000 + i, 0.5 + i, top))
        for grow in GROWN.values():
            grow(request)
        request.output[0] = msgspec.structs.replace(request.output[0], prompt_scores=bytes(request.scores))
        return request

    size, request = taken(made)
    assert size <= request.log_bytes <= 2 * size


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TextRules)])
def test_rules_of_texts_count_each_of_their_fields(name: str) -> None:
    hint = get_type_hints(TextRules)[name]

    def made() -> TextRules:
        if name == "output":  # OutputRules: how the model writes, and the names of the request's tools
            rules = next(part for part in get_args(hint) if part is not NoneType)
            return TextRules(output=rules(names=filled(frozenset[str])))
        return TextRules(**{name: filled(hint)})

    size, rules = taken(made)
    assert size <= rules.bytes_kept + 1024


# Bodies with one field as long as it may be, beside which nothing is long.
MANY = [f"{i} {WIDE}" for i in range(64)]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOLS = [TOOL | {"function": {"name": f"f{i}", "description": "x" * 500}} for i in range(128)]
FLAT = [{"type": "function", "name": f"f{i}", "parameters": {"a": [[]] * 200}} for i in range(128)]
SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}}
GENERATED: dict[str, Any] = {
    "logit_bias": {str(i): 1.5 for i in range(300, 400)},
    "stop": [f"{i:4}" + WIDE * 1000 for i in range(64)],
    "stop_token_ids": list(range(256)),
    "bad_words": [f"word {i} of these" for i in range(128)],
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    "structured_outputs": {"choice": MANY},
    "guided_json": SCHEMA,
    "guided_regex": "a" * 4000,
    "guided_choice": MANY,
    "guided_grammar": 'start: "' + "a" * 4000 + '"',
    "guided_whitespace_pattern": None,  # of guided_json
    "cache_salt": WIDE * 256,
    "request_id": "r" * 128,
    "model": None,  # the one name that is served
    "stream_options": None,  # three switches
}
CHAT_FIELDS: dict[str, Any] = GENERATED | {
    "messages": [{"role": "user", "content": "Hello " * 20}] * 2,
    "chat_template": None,  # off
    "chat_template_kwargs": {f"k{i}": ["v"] * 50 for i in range(100)},
    "tools": TOOLS,
    "tool_choice": None,  # names of tools
}
LONG: dict[type[BaseModel], dict[str, Any]] = {
    CompletionRequest: GENERATED | {"prompt": [[300 + k for k in range(10)] for _ in range(128)]},
    ChatRequest: CHAT_FIELDS,
    ResponsesRequest: {
        "model": None,
        "input": [{"type": "message", "role": "user", "content": "Hello " * 20}] * 2,
        "instructions": "be brief " * 20,
        "stream_options": None,
        "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}, "verbosity": WIDE * 5000},
        "reasoning": None,
        "tools": FLAT,
        "tool_choice": None,
        "include": ["reasoning.encrypted_content"] * 16,
        "metadata": {f"{i:2}" + WIDE * 60: WIDE * 512 for i in range(16)},
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
        "chat_template_kwargs": CHAT_FIELDS["chat_template_kwargs"],
        "cache_salt": WIDE * 256,
        "request_id": "r" * 128,
    },
}
SHORT = (int, float, bool)
BODIES: list[tuple[type[BaseModel], Any, dict[str, Any]]] = [
    (CompletionRequest, prepare_completion, {"prompt": [300]}),
    (ChatRequest, prepare_chat, {"messages": [{"role": "user", "content": "x"}]}),
    (ResponsesRequest, prepare_responses, {"input": "x"}),
]


def is_short(annotation: Any) -> bool:
    """A number, a switch, or one of some words."""
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return all(is_short(part) for part in parts)
    if hasattr(annotation, "__metadata__"):
        return is_short(parts[0])
    return annotation in (*SHORT, NoneType) or (all(isinstance(part, str) for part in parts) and bool(parts))


@pytest.mark.parametrize("kind", LONG)
def test_each_field_that_a_body_may_make_long_is_filled_below(kind: type[BaseModel]) -> None:
    long = {name for name, field in kind.model_fields.items() if not is_short(field.annotation)}
    assert long == set(LONG[kind]), (
        "a new field: give its longest value here, and see that it is counted or bounded"
    )


@pytest.mark.parametrize(("kind", "prepare", "least"), BODIES)
def test_a_gateway_counts_each_field_of_a_body(
    kind: type[BaseModel], prepare: Any, least: dict[str, Any]
) -> None:
    async def body(stack: Stack) -> None:
        service = stack.service
        await prepare(service, json.dumps(least).encode(), Origin(1, 1))
        for name, value in LONG[kind].items():
            if value is None:
                continue
            raw = json.dumps(least | {name: value}, ensure_ascii=False).encode()
            if name == "tools" and not service.model.calls_tools:
                raw = json.dumps(least | {name: value, "tool_choice": "none"}).encode()
            counted, sizes = 0, list[int]()
            # At first what is made once is made; and what else runs in this process may allocate meanwhile: the least
            # is what is kept.
            while len(sizes) < TRIES and (len(sizes) < 3 or min(sizes) > counted):
                gc.collect()
                tracemalloc.start()
                try:
                    before = tracemalloc.get_traced_memory()[0]
                    prepared = await prepare(service, raw, Origin(1, 1))
                    gc.collect()
                    sizes.append(tracemalloc.get_traced_memory()[0] - before)
                finally:
                    tracemalloc.stop()
                counted = kept_bytes(prepared, prepared.options, [])
            size = min(sizes)
            assert size <= counted, name
            assert counted <= 12 * size + 2 * CHOICE_BYTES * len(prepared.plans), name

    with_stack(body, limit_s=100.0, nodes=1)


def test_what_does_not_depend_on_the_prompt_is_made_once_for_all_prompts() -> None:
    async def body(stack: Stack) -> None:
        fields = {
            "stop_token_ids": list(range(256)),
            "bad_words": ["a b", "c"],
            "logit_bias": {"5": 1},
            "n": 2,
        }
        raw = json.dumps({"prompt": [[300]] * 64} | fields).encode()
        prepared = await prepare_completion(stack.service, raw, Origin(1, 1))
        for name in ("stop_token_ids", "bad_words", "logit_bias", "grammar"):
            assert len({id(getattr(plan.sampling, name)) for plan in prepared.plans}) == 1, name
        assert len({plan.sampling.seed for plan in prepared.plans}) == 2

    with_stack(body, nodes=1)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [300], "stop_token_ids": list(range(257))}, "stop_token_ids"),
        ("/v1/responses", {"input": "x", "metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ("/v1/responses", {"input": "x", "metadata": {"a": "x" * 513}}, "metadata"),
    ],
)
def test_more_of_what_no_client_needs_is_refused_by_name(
    path: str, fields: dict[str, Any], param: str
) -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            answer = await client.post(path, json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    with_stack(body, nodes=1)
