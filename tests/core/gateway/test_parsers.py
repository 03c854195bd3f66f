"""Reasoning and tool calls as each family writes them, whole, broken, and cut anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from web.gateway.text.parsers.output import OutputParser, OutputRules, ToolFormat
from web.gateway.text.parsers.parsed import Parsed
from web.gateway.text.parsers.python_literal import NotLiteral, to_json
from web.gateway.text.parsers.reasoning import MISTRAL_THINK, THINK, ReasoningMeter, ReasoningSplitter

NAMES = frozenset({"get_weather", "add", "ns.tool-x"})
HERMES, LLAMA, PYTHONIC, MISTRAL = (
    ToolFormat.HERMES,
    ToolFormat.LLAMA_JSON,
    ToolFormat.PYTHONIC,
    ToolFormat.MISTRAL,
)


def rules(kind: ToolFormat | None, reasoning: bool = False, calls_max: int | None = None) -> OutputRules:
    return OutputRules(THINK if reasoning else None, kind, NAMES, calls_max)


def read(how: OutputRules, pieces: list[str], inside: bool = False, finish: bool = True) -> Parsed:
    parser, whole = OutputParser(how, inside), Parsed()
    for piece in pieces:
        if parser.done:
            break
        whole.add(parser.push(piece))
    if finish:
        whole.add(parser.finish())
    return whole


def calls_of(parsed: Parsed) -> list[tuple[str, str]]:
    assert [c.index for c in parsed.calls] == list(range(len(parsed.calls)))
    return [(c.name, c.arguments) for c in parsed.calls]


WEATHER = '{"city": "Köln }{ \\" </tool_call>", "days": [1, {"x": null}]}'
ADD = '{"a": -1.5e3, "b": true}'

LLAMA_TWO = (
    '{"type": "function", "name": "add", "parameters": {}}; {"name": "get_weather", "parameters": '
    f"{WEATHER}}};"
)

WHOLE: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Just text.\n", "Just text.\n", []),
    (HERMES, f'<tool_call>\n{{"name": "add", "arguments": {ADD}}}\n</tool_call>', "", [("add", ADD)]),
    (
        HERMES,
        f'Let me see.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n<tool_call>'
        f'{{"arguments": {ADD}, "name": "add"}}</tool_call>\n',
        "Let me see.",
        [("get_weather", WEATHER), ("add", ADD)],
    ),
    (HERMES, '<tool_call>{"name": "f"}</tool_call> and more', "and more", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>x', "x", [("f", '{"a": 1}')]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call> x',
        "x",
        [("f", "{'a': 1}}")],
    ),
    (HERMES, "a <tool_call> is a mark <b>", "a <tool_call> is a mark <b>", []),
    (
        HERMES,
        '<tool_call>no</tool_call> <tool_call>{"name": "f"}',
        "<tool_call>no</tool_call>",
        [("f", "{}")],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut')]),
    (HERMES, '<tool_call>{"nam', '<tool_call>{"nam', []),
    (HERMES, "  indented <tool_", "  indented <tool_", []),
    (
        HERMES,
        f'<tool_call>\n{{"name": "add", "arguments": {ADD}}}\n{{"name": "f"}}, {{"name": "g"}}\n</tool_call> x',
        "x",
        [("add", ADD), ("f", "{}"), ("g", "{}")],
    ),
    (
        HERMES,
        f'<tool_call>[{{"name": "add", "arguments": {ADD}}}, {{"name": "f"}}]</tool_call>',
        "",
        [("add", ADD), ("f", "{}")],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>x', "x", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}} x', "} x", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f"}}} </tool_call>', "}} </tool_call>", [("f", "{}")]),
    (
        HERMES,
        f'<tool_call>\n```json\n{{"name": "add", "arguments": {ADD}}}\n```\n</tool_call>\n'
        '<tool_call>```[{"name": "f"}]```</tool_call>',
        "",
        [("add", ADD), ("f", "{}")],
    ),
    (HERMES, '<tool_call>{"name": "f"}, {"a": 1}</tool_call>', ', {"a": 1}</tool_call>', [("f", "{}")]),
    (HERMES, "<tool_call>```json\n[1]```</tool_call>", "<tool_call>```json\n[1]```</tool_call>", []),
    (HERMES, "<tool_call>``", "<tool_call>``", []),
    (HERMES, "<tool_call>" + " " * 99 + '[{"name": "f"}]', "<tool_call>" + " " * 99 + '[{"name": "f"}]', []),
    (LLAMA, f'{{"name": "add", "parameters": {ADD}}}', "", [("add", ADD)]),
    (LLAMA, ' <|python_tag|>{"name": "add", "parameters": {}}', "", [("add", "{}")]),
    (
        LLAMA,
        LLAMA_TWO,
        "",
        [("add", "{}"), ("get_weather", WEATHER)],
    ),
    (LLAMA, '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    (LLAMA, '{"name": "add", "age": 3}', '{"name": "add", "age": 3}', []),
    (LLAMA, '{"a": 1}', '{"a": 1}', []),
    (LLAMA, 'See {"name": "add", "parameters": {}}', 'See {"name": "add", "parameters": {}}', []),
    (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA, '{"name": "add", "parameters": {}} Done', "Done", [("add", "{}")]),
    (
        LLAMA,
        f'[{{"name": "add", "parameters": {ADD}}}, {{"name": "get_weather"}}]\n',
        "",
        [("add", ADD), ("get_weather", "{}")],
    ),
    (LLAMA, '[{"name": "add", "parameters": {}}, {"a": 1}]', ', {"a": 1}]', [("add", "{}")]),
    (LLAMA, '[{"name": "Bob"}]\n[1]', '[{"name": "Bob"}]\n[1]', []),
    (LLAMA, '{"type": "function", "name": "add"}', "", [("add", "{}")]),
    (LLAMA, f'Let me see.\n\n{{"name": "add", "parameters": {ADD}}}', "Let me see.", [("add", ADD)]),
    (LLAMA, f'{{"a":\n1}}\n{{"name": "add", "parameters": {ADD}}}', '{"a":\n1}', [("add", ADD)]),
    (LLAMA, f'{{\n{{"name": "add", "parameters": {ADD}}}', "{", [("add", ADD)]),
    (LLAMA, f'See <|python_tag|>{{"name": "add", "parameters": {ADD}}} so', "Seeso", [("add", ADD)]),
    (LLAMA, '{"name": "add"}<|eom_id|>', "", [("add", "{}")]),
    (LLAMA, '{"name": "add"}; <|python_tag|>{"name": "add"} ;<|eot_id|>', "", [("add", "{}"), ("add", "{}")]),
    (LLAMA, '{"name": "add"}; <|python_tag|>print', "; <|python_tag|>print", [("add", "{}")]),
    (LLAMA, '{"name": "add"} <|eo', "<|eo", [("add", "{}")]),
    (LLAMA, '{"name": "add", "parameters": {x}}<|eom_id|>', "", [("add", "{x}}")]),
    (
        LLAMA,
        'As in\n\n```json\n{"name": "add"}\n```\n{"name": "add"}',
        'As in\n\n```json\n{"name": "add"}\n```',
        [("add", "{}")],
    ),
    (
        PYTHONIC,
        "[get_weather(city='Köln ]) \\' x', days=[1, {'x': None}]), add(a=-1.5e3, b=True,)]",
        "",
        [
            ("get_weather", '{"city": "Köln ]) \' x", "days": [1, {"x": null}]}'),
            ("add", '{"a": -1.5e3, "b": true}'),
        ],
    ),
    (PYTHONIC, "<|python_start|>[ns.tool-x()]<|python_end|>", "", [("ns.tool-x", "{}")]),
    (PYTHONIC, "[1, 2]", "[1, 2]", []),
    (PYTHONIC, "[other(a=1)]", "[other(a=1)]", []),
    (PYTHONIC, "[add(a=b)]", "", [("add", "{a=b)]")]),
    (PYTHONIC, "[add(a=1)] ok", "ok", [("add", '{"a": 1}')]),
    (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {ADD}, "id": "abcdefghi"}}, {{"name": "f", "arguments": {{}}}}]',
        "",
        [("add", ADD), ("f", "{}")],
    ),
    (MISTRAL, f"[TOOL_CALLS]add{ADD}[TOOL_CALLS]f{{}}", "", [("add", ADD), ("f", "{}")]),
    (MISTRAL, f"Hm.[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{ADD}", "Hm.", [("add", ADD)]),
    (MISTRAL, f'Hm. [TOOL_CALLS]{{"name": "add", "arguments": {ADD}}} Done', "Hm.Done", [("add", ADD)]),
    (
        MISTRAL,
        f'[TOOL_CALLS] {{"arguments": {ADD}, "name": "add"}}, {{"name": "f"}}\n',
        "",
        [("add", ADD), ("f", "{}")],
    ),
    (MISTRAL, f'[TOOL_CALLS]{{"name": "f"}}[TOOL_CALLS]add[ARGS]{ADD}', "", [("f", "{}"), ("add", ADD)]),
    (MISTRAL, '[TOOL_CALLS]{"name": "f"}; {"a": 1}', '; {"a": 1}', [("f", "{}")]),
    (MISTRAL, '[TOOL_CALLS] {"a": 1}', '[TOOL_CALLS] {"a": 1}', []),
    (MISTRAL, "[TOOL_CALLS] no, none", "[TOOL_CALLS] no, none", []),
    (MISTRAL, "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
    (MISTRAL, "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    (MISTRAL, "a [1] list [TOOL_", "a [1] list [TOOL_", []),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), WHOLE)
def test_what_a_text_says(kind: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text)):
        parsed = read(rules(kind), pieces)
        assert (parsed.content, parsed.reasoning, calls_of(parsed)) == (content, "", calls)


def test_a_mistral_model_that_reasons() -> None:
    how = OutputRules(MISTRAL_THINK, MISTRAL)
    parsed = read(how, list("[THINK]So.[/THINK]Yes.[TOOL_CALLS]f{}"))
    assert (parsed.reasoning, parsed.content, calls_of(parsed)) == ("So.", "Yes.", [("f", "{}")])


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nHm, <b>.\n</think>\n\nYes.\n", False, "Hm, <b>.", "Yes.\n"),
        ("\nHm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("\n <think>a  b</think>", False, "a  b", ""),
        ("No <think> at the start</think>", False, "", "No <think> at the start</think>"),
        ("<think>cut \n", False, "cut \n", ""),
        ("cut </thi", True, "cut </thi", ""),
        ("</think>a</think>", True, "", "a</think>"),
        ("<thi", False, "", "<thi"),
        (" \n", False, "", " \n"),
    ],
)
def test_reasoning(text: str, inside: bool, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        parsed = read(rules(None, True), pieces, inside)
        assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_calls_within_the_reasoning_are_none() -> None:
    text = '<think><tool_call>{"name": "f"}</tool_call></think><tool_call>{"name": "g"}</tool_call>'
    parsed = read(rules(HERMES, True), [text])
    assert parsed.reasoning == '<tool_call>{"name": "f"}</tool_call>'
    assert calls_of(parsed) == [("g", "{}")]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}|\n</tool_call>\n<tool_call>{"name": "g"}'),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}|; {"name": "add", "parameters": {}}'),
        (PYTHONIC, "[add(a=1)|, add(a=2)]"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}|, {"name": "g", "arguments": {}}]'),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}|[TOOL_CALLS]g{}'),
    ],
)
def test_the_output_ends_with_the_last_call_that_there_may_be(kind: ToolFormat, text: str) -> None:
    first, rest = text.split("|")
    parser = OutputParser(rules(kind, calls_max=1), False)
    for char in first[:-1]:
        parser.push(char)
        assert not parser.done
    parser.push(first[-1] + rest)
    assert parser.done
    parsed = read(rules(kind, calls_max=1), [first + rest])
    assert [c.arguments for c in parsed.calls] == ['{"a": 1}']


# Cuts: what a client has after k characters does not depend on how they came.

WORDS = [
    *("<tool_call>", "</tool_call>", "<tool_ca", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<|python_start|>", "<|python_end|>", "<think>", "</think>", "</", "\n", " ", "  \n", "a", "ö", "."),
    *('{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {}}', '{"name":', '"add"'),
    *("add(", "a=1", "b='x'", "get_weather(city='K')", "[", "]", "{", "}", "(", ")", ",", ";", ":", "=", '"'),
    *(
        "'",
        "\\",
        "1",
        "true",
        "None",
        '"arguments":',
        "add",
        "```",
        "```json\n",
        "<|eom_id|>",
        "<|eo",
        '{"name": "add"}',
    ),
]
TEXTS = st.one_of(
    st.sampled_from([text for _, text, _, _ in WHOLE]),
    st.lists(st.sampled_from(WORDS), max_size=14).map("".join),
)


def test_objects_in_one_another_are_read_once() -> None:
    text = '{"a":\n' * 100_000
    assert read(rules(LLAMA), [text, "1"]).content == text + "1"


KINDS = st.sampled_from([None, HERMES, LLAMA, PYTHONIC, MISTRAL])


@settings(max_examples=1500, deadline=None)
@given(TEXTS, KINDS, st.booleans(), st.booleans(), st.sampled_from([None, 1]), st.data())
def test_cuts_change_nothing(
    text: str, kind: ToolFormat | None, reasoning: bool, inside: bool, calls_max: int | None, data: Any
) -> None:
    how = rules(kind, reasoning, calls_max)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    until = data.draw(st.integers(0, len(pieces)))
    prefix = "".join(pieces[:until])
    for finish in (False, True):
        assert read(how, pieces[:until], inside, finish) == read(how, [prefix], inside, finish)
    before, after = read(how, [prefix], inside, False), read(how, [text], inside, False)
    assert after.content.startswith(before.content)
    assert after.reasoning.startswith(before.reasoning)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.booleans())
def test_the_meter_says_what_the_splitter_says(text: str, inside: bool) -> None:
    splitter, meter = ReasoningSplitter(THINK, inside), ReasoningMeter(THINK, inside)
    for char in text:
        before = splitter.inside
        splitter.push(char, Parsed())
        assert meter.push(char) == (before or splitter.inside)
        assert meter.inside == splitter.inside


@settings(max_examples=300, deadline=None)
@given(TEXTS, KINDS)
def test_what_is_no_call_is_all_there(text: str, kind: ToolFormat | None) -> None:
    parsed = read(rules(kind), [text])
    if not parsed.calls:
        assert parsed.content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_literals_of_python(value: Any) -> None:
    assert json.loads(to_json(repr(value))) == value
    arguments = json.dumps({"value": value}, ensure_ascii=False)
    for text, kind in [
        (f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>', HERMES),
        (f"[TOOL_CALLS]add{arguments}", MISTRAL),
        (f'{{"name": "add", "parameters": {arguments}}}', LLAMA),
        (f"[add(value={value!r})]", PYTHONIC),
    ]:
        parsed = read(rules(kind), [text])
        assert parsed.content == ""
        assert [(c.name, json.loads(c.arguments)) for c in parsed.calls] == [("add", {"value": value})]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(1, 'a')", [1, "a"]),
        ("'a' \"b\"", "ab"),
        ("1_000", 1000),
        (".5", 0.5),
        ("-007", -7),
        ("{'a': true, 'b': null}", {"a": True, "b": None}),
        (r"'\u00e9\x41\q\'\n'", "éA\\q'\n"),
        (r"'\ud83d\ude00'", "😀"),
    ],
)
def test_more_literals(text: str, value: Any) -> None:
    assert json.loads(to_json(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "f(1)",
        "[1",
        "{1: 2}",
        "{'a'}",
        "1 2",
        "'a",
        "[" * 100 + "]" * 100,
        "1+1",
        "nan",
        "'\\xzz'",
        "__import__",
    ],
)
def test_what_is_no_literal(text: str) -> None:
    with pytest.raises(NotLiteral):
        to_json(text)
