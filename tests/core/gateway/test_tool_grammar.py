"""Grammars of calls, followed by the real library: all that they allow reads back as calls of the request's tools."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer

from controlplane.grammar import Compiler, GrammarError, load_compiler
from dataplane.demo import model_dir
from web.gateway.openai.structured import json_grammar
from web.gateway.openai.tool_grammar import Calls, Reasoning, output_grammar
from web.gateway.openai.tools import Function
from web.gateway.text.parsers.output import OutputParser, OutputRules, ToolFormat
from web.gateway.text.parsers.parsed import Parsed
from web.gateway.text.parsers.reasoning import THINK

VOCAB, ENDS = 2048, (1, 2)
LEAF = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
WEATHER = Function(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 9},
                "maxItems": 3,
            },
            "more": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"leaf": LEAF},
    },
)
PING = Function(name="ping")
FUNCTIONS = (WEATHER, PING)
NAMES = frozenset(f.name for f in FUNCTIONS)
ANSWER = json_grammar(LEAF)
EXAMPLES = {
    ToolFormat.HERMES: '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x", "days": [1, 2]}}\n'
    '</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
    ToolFormat.LLAMA_JSON: '{"name": "get_weather", "parameters": {"city": "x"}}; {"name": "ping", "parameters": {}}',
    ToolFormat.PYTHONIC: '[get_weather(city="x", days=[1, 2]), ping(), get_weather(city="y", more={"on": true})]',
    ToolFormat.MISTRAL: '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "x"}}, '
    '{"name": "ping", "arguments": {}}]',
    ToolFormat.MISTRAL_NAMED: '[TOOL_CALLS]get_weather{"city": "x"}[TOOL_CALLS]ping{}',
    ToolFormat.MISTRAL_ARGS: '[TOOL_CALLS]get_weather[ARGS]{"city": "x"}[TOOL_CALLS]ping[ARGS]{}',
}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


@cache
def compiler() -> Compiler:
    return load_compiler(model_dir(), VOCAB, ENDS)


def matches(grammar: str, text: str) -> bool:
    """Whether `text` is a whole output."""
    matcher = compiler().compile(grammar)
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    return bool(matcher.consume_tokens(ids) and matcher.is_accepting())


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize(
    ("reasoning", "before"),
    [
        (None, ""),
        (Reasoning(THINK, False), ""),
        (Reasoning(THINK, False), "<think>\nHm </b.\n</think>\n\n"),
        (Reasoning(THINK, True), "\nHm <think>.\n</think>\n\n"),
    ],
)
def test_what_each_family_writes(kind: ToolFormat, reasoning: Reasoning | None, before: str) -> None:
    must = output_grammar("", Calls(kind, FUNCTIONS), reasoning, {})
    either = output_grammar(ANSWER, Calls(kind, FUNCTIONS, must=False), reasoning, {})
    for grammar in (must, either):
        assert matches(grammar, before + EXAMPLES[kind])
        assert not matches(grammar, before + EXAMPLES[kind].replace("get_weather", "get_whether"))
        assert not matches(grammar, before + "Hello")
        assert not matches(grammar, before)
    assert matches(either, before + '{"on": true}')
    assert not matches(must, before + '{"on": true}')
    one = output_grammar("", Calls(kind, FUNCTIONS, calls_max=1), reasoning, {})
    assert not matches(one, before + EXAMPLES[kind])


@pytest.mark.parametrize("kind", [ToolFormat.PYTHONIC, ToolFormat.LLAMA_JSON])
def test_parameters_with_nulls(kind: ToolFormat) -> None:
    function = Function(
        name="ping", parameters={"type": None, "properties": None, "required": None, "$defs": None}
    )
    said = "[ping()]" if kind is ToolFormat.PYTHONIC else '{"name": "ping", "parameters": {}}'
    assert matches(output_grammar("", Calls(kind, (function,)), None, {}), said)


def test_an_answer_after_the_reasoning() -> None:
    for answer, text in ((ANSWER, '{"on": false}'), ('start: "yes" | "no"', "no")):
        inside = output_grammar(answer, None, Reasoning(THINK, True), {})
        assert matches(inside, f"Hm.\n</think>\n\n{text}")
        assert not matches(inside, text)
        perhaps = output_grammar(answer, None, Reasoning(THINK, False), {})
        assert matches(perhaps, f"<think>Hm.</think>{text}")
        assert matches(perhaps, text)
        assert output_grammar(answer, None, None, {}) == answer


def test_marks_that_are_special_tokens() -> None:
    """They have no text: a grammar names their ids."""
    special = {"<tool_call>": 4, "</tool_call>": 5, "</think>": 3}
    calls = Calls(ToolFormat.HERMES, (PING,), calls_max=1)
    matcher = compiler().compile(output_grammar("", calls, Reasoning(THINK, True), special))
    said = '\n{"name": "ping", "arguments": {}}\n'
    thought, call = (tokenizer().encode(text, add_special_tokens=False).ids for text in ("Hm.", said))
    assert matcher.consume_tokens([*thought, 3, 4, *call, 5])
    assert matcher.is_accepting()


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("calls_max", [None, 1])
def test_whatever_is_allowed_reads_back(kind: ToolFormat, calls_max: int | None) -> None:
    """Tokens drawn from those that the grammar allows."""
    grammar = output_grammar("", Calls(kind, FUNCTIONS, calls_max), Reasoning(THINK, True), {})
    ended = 0
    for seed in range(12):
        text = draw(grammar, random.Random(seed))
        if text is None:
            continue
        ended += 1
        parser, parsed = OutputParser(OutputRules(THINK, kind, NAMES, calls_max), True), Parsed()
        for char in text:
            parsed.add(parser.push(char))
        parsed.add(parser.finish())
        assert parsed.content == "", text
        assert parsed.calls, text
        for call in parsed.calls:
            arguments = json.loads(call.arguments)
            check_arguments(call.name, arguments)
    assert ended >= 6, "most of them end"


def draw(grammar: str, draw_from: random.Random) -> str | None:
    """The end is taken where it may be, and so is what closes something: not always, but soon."""
    matcher, mask = compiler().compile(grammar), allocate_token_bitmask(1, VOCAB)
    ids: list[int] = tokenizer().encode("Hm.\n</think>", add_special_tokens=False).ids
    assert matcher.consume_tokens(ids)
    closing = [t for t in range(VOCAB) if tokenizer().decode([t])[:1] in ('"', "}", "]", ")", "<", ",", "/")]
    for _ in range(400):
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB]).tolist()
        if not allowed or matcher.is_stopped() or (matcher.is_accepting() and draw_from.random() < 0.5):
            assert matcher.is_accepting()
            return str(tokenizer().decode(ids))
        soon = [t for t in closing if t in set(allowed)]
        token = draw_from.choice(soon if soon and draw_from.random() < 0.4 else allowed)
        if token in ENDS:
            return str(tokenizer().decode(ids))
        ids.append(token)
        assert matcher.consume_token(token)
    return None


def check_arguments(name: str, arguments: Any) -> None:
    assert name in NAMES
    if name == "ping":
        assert arguments == {}
        return
    assert set(arguments) <= {"city", "days", "more"}
    assert len(arguments["city"]) <= 12
    assert all(0 <= day <= 9 for day in arguments.get("days", []))
    more = arguments.get("more")
    assert more is None or set(more) == {"on"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("kind", "function", "why"),
    [
        (ToolFormat.HERMES, Function(name="f", parameters={"type": "string"}), "no object"),
        (ToolFormat.HERMES, Function(name="f", parameters=nested(70)), "nested too deep"),
        (ToolFormat.HERMES, Function(name="f", parameters={"description": "x" * 200_000}), "bytes"),
        (ToolFormat.PYTHONIC, Function(name="7f"), "no word like '7f'"),
        (
            ToolFormat.PYTHONIC,
            Function(name="f", parameters={"properties": {"a b": {}}}),
            "no word like 'a b'",
        ),
        (ToolFormat.PYTHONIC, Function(name="f", parameters={"required": ["a"]}), "none of their properties"),
        (ToolFormat.PYTHONIC, Function(name="f", parameters={"properties": [1]}), "no JSON schema"),
    ],
)
def test_what_cannot_be_a_grammar(kind: ToolFormat, function: Function, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        output_grammar("", Calls(kind, (function,)), None, {})
