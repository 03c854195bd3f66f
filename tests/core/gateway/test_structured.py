"""What a request demands of its output, and the grammar that comes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from controlplane.contract.requests import GRAMMAR_BYTES_MAX
from controlplane.grammar import Compiler, GrammarError, load_compiler
from dataplane.demo import model_dir
from web.gateway.errors import ApiError
from web.gateway.openai.grammar_check import in_clear
from web.gateway.openai.requests import CompletionRequest, parse
from web.gateway.openai.structured import (
    DEPTH_MAX,
    DIALECTS,
    SOURCE_BYTES_MAX,
    WHITESPACE,
    Asked,
    asked_of,
    depth_of,
    json_grammar,
    text_of,
)

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def asked(**fields: Any) -> Asked | None:
    return asked_of(parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode()))


def grammar(**fields: Any) -> str:
    found = asked(**fields)
    assert found is not None
    return text_of(found)


def schema_in(text: str) -> Any:
    (only,) = json.loads(text)["grammars"]
    return only["json_schema"]


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return load_compiler(model_dir(), 2048, (1, 2))


def accepts(compiler: Compiler, text: str, output: str) -> bool:
    """Whether an output is all of what the grammar wants, byte by byte."""
    matcher = compiler.compile(text)
    tokens = compiler._tokenizer.tokenize_str(output)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_who_asks_for_nothing_gets_no_grammar() -> None:
    for fields in (
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"guided_json": None, "structured_outputs": None},
        {"guided_whitespace_pattern": " *", "guided_decoding_backend": "xgrammar"},
    ):
        assert asked(**fields) is None, fields


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": OBJECT, "strict": True},
            }
        },
        {"structured_outputs": {"json": OBJECT}},
        {"structured_outputs": {"json": json.dumps(OBJECT), "disable_fallback": True}},
        {"guided_json": OBJECT},
        {"guided_json": json.dumps(OBJECT)},
    ],
)
def test_every_way_to_give_a_schema_is_the_same_grammar(fields: dict[str, Any], compiler: Compiler) -> None:
    text = grammar(**fields)
    assert schema_in(text) == OBJECT | {"x-guidance": WHITESPACE}
    assert accepts(compiler, text, '{"a": 5}')
    assert accepts(compiler, text, '{\n  "a":5\n}')
    assert not accepts(compiler, text, '{"a": "5"}')
    assert not accepts(compiler, text, '{\n\n"a":5}')


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1, null]}', "[1]"),
        ({"structured_outputs": {"json_object": True}}, "{}", '"x"'),
        ({"structured_outputs": {"json": True}}, "[1]", "x"),
        ({"structured_outputs": {"regex": "[ab]{2}c?"}}, "abc", "abcc"),
        ({"guided_regex": "[ab]{2}c?"}, "ba", "b"),
        ({"structured_outputs": {"choice": ["yes", 'a "quote"', "é\n"]}}, 'a "quote"', "a"),
        ({"guided_choice": ["yes", "é\n"]}, "é\n", "no"),
        ({"structured_outputs": {"grammar": 'start: "a" /[0-9]+/'}}, "a12", "a"),
        ({"guided_grammar": 'root ::= "a" | "b" rest\nrest ::= [0-9]+'}, "b7", "a7"),
    ],
)
def test_every_kind_holds_the_output_to_what_it_says(
    fields: dict[str, Any], good: str, bad: str, compiler: Compiler
) -> None:
    assert accepts(compiler, grammar(**fields), good)
    assert not accepts(compiler, grammar(**fields), bad)


def test_whitespace_is_as_the_client_wants_it(compiler: Compiler) -> None:
    tight = grammar(structured_outputs={"json": OBJECT, "disable_any_whitespace": True})
    assert accepts(compiler, tight, '{"a":5}')
    assert not accepts(compiler, tight, '{"a": 5}')
    for fields in (
        {"structured_outputs": {"json": OBJECT, "whitespace_pattern": "_*"}},
        {"guided_json": OBJECT, "guided_whitespace_pattern": "_*"},
    ):
        assert accepts(compiler, grammar(**fields), '{__"a":5}')
    own = OBJECT | {"x-guidance": {"whitespace_pattern": "-?"}}
    assert accepts(compiler, grammar(guided_json=own), '{-"a":5}')


def test_keywords_that_demand_nothing_are_passed_over(compiler: Compiler) -> None:
    """As generators of schemas write them; where they demand something they are refused."""
    record: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "integer"}}
    record |= {"propertyNames": {"type": "string"}, "dependentRequired": {}, "unevaluatedProperties": True}
    many = {"type": "array", "items": record, "uniqueItems": False}
    text = grammar(guided_json=many)
    assert accepts(compiler, text, '[{"a": 1}, {"a": 1}]')
    assert not accepts(compiler, text, '[{"a": "b"}]')
    for more in ({"uniqueItems": True}, {"items": record | {"propertyNames": {"pattern": "^a"}}}):
        with pytest.raises(GrammarError, match=r"uniqueItems|propertyNames"):
            accepts(compiler, grammar(guided_json=many | more), "[]")


def test_schemas_as_other_languages_write_them(compiler: Compiler) -> None:
    """Absent keywords as null, counts as doubles, definitions by names that no URI has, drafts under other names."""
    names = ("List<T>", "A B", "Zahl é", "Box[int]")
    schema = {
        "$schema": "https://json-schema.org/draft-07/schema#",
        "type": "object",
        "title": None,
        "properties": {str(at): {"$ref": f"#/$defs/{name}"} for at, name in enumerate(names)},
        "required": [str(at) for at in range(len(names))],
        "additionalProperties": None,
        "$defs": {name: {"type": "string", "maxLength": 1.0, "enum": None} for name in names},
    }
    text = grammar(guided_json=schema)
    assert accepts(compiler, text, '{"0": "a", "1": "b", "2": "c", "3": "d"}')
    assert not accepts(compiler, text, '{"0": "aa", "1": "b", "2": "c", "3": "d"}')
    null = grammar(guided_json={"enum": [None, "a"], "$schema": "http://example.com/own", "items": None})
    assert accepts(compiler, null, "null")
    assert accepts(compiler, grammar(guided_json={"const": None}), "null")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^ab\Z", ["ab"], ["abZ", "abc", "xab"]),
        (r"^(a\Z|b)", ["bc", "a"], ["ac"]),
        (r"^a{,3}$", ["", "aaa"], ["aaaa", "a{,3}"]),
        (r"^[\b]$", ["\b"], ["b"]),
        (r"^\cA$", ["\x01"], ["A"]),
        (r"^\\Z$", ["\\Z"], ["\\"]),
        (r"^\{,3}$", ["{,3}"], [""]),
        (r"^[{,3}]$", ["{", "3"], ["33"]),
    ],
)
def test_patterns_as_others_write_them(
    pattern: str, good: list[str], bad: list[str], compiler: Compiler
) -> None:
    """Python's, wherever they may stand; all of an output has to match where no schema is given."""
    schema = grammar(guided_json={"type": "string", "pattern": pattern})
    names = grammar(
        guided_json={"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
    )
    for text, ok in [*((text, True) for text in good), *((text, False) for text in bad)]:
        assert accepts(compiler, schema, json.dumps(text)) == ok, text
        assert accepts(compiler, names, json.dumps({text: 1})) == ok, text
    plain = grammar(guided_regex=pattern.removeprefix("^"))
    assert [accepts(compiler, plain, text) for text in (good[-1], bad[0])] == [True, False]


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^[a&&b]$", ["a", "&"], ["c"]),
        ("^[[a]b]$", ["[b]", "ab]"], ["a", "b"]),
        ("^[+--]$", ["+", ",", "-"], ["."]),
        ("^[a~~]$", ["a", "~"], ["b"]),
        ("^[[:alpha:]]$", ["a"], ["1"]),
        (r"^[^\]a]$", ["b"], ["a", "]"]),
        (r"^\<a\>$", ["<a>"], ["a"]),
        ("^a[^]b$", ["a]b", "a\nb"], ["ab"]),
    ],
)
def test_classes_in_schemas_are_those_of_ecmascript(
    pattern: str, good: list[str], bad: list[str], compiler: Compiler
) -> None:
    """Rust reads some characters there as more than themselves, and a bracket at the beginning as less."""
    schema = grammar(guided_json={"type": "string", "pattern": pattern})
    for text, ok in [*((text, True) for text in good), *((text, False) for text in bad)]:
        assert accepts(compiler, schema, json.dumps(text)) == ok, text


def test_a_class_of_nothing_is_refused() -> None:
    with pytest.raises(GrammarError, match=r"an empty class \(\[\]\) matches nothing"):
        grammar(guided_json={"type": "string", "pattern": "^[]a]$"})


@pytest.mark.parametrize("pattern", [r"\bab\b", r"a\B", r"(a)\1", "(?=a)a", "(?<!a)b", r"(?<n>a)\k<n>"])
def test_patterns_that_cannot_be_followed_are_refused_by_name(pattern: str) -> None:
    why = "word boundaries|backreferences|look-ahead|look-behind"
    with pytest.raises(GrammarError, match=f"^pattern .*({why})"):
        grammar(guided_json={"type": "array", "items": {"type": "string", "pattern": pattern}})
    with pytest.raises(GrammarError, match=f"^patternProperties .*({why})"):
        grammar(guided_json={"type": "object", "patternProperties": {pattern: {}}})
    with pytest.raises(GrammarError, match=f"^the pattern .*({why})"):
        grammar(guided_regex=pattern)


@pytest.mark.parametrize("name", ["50%", "a%b", "%", "a%2", "%zz", "a % b"])
def test_definitions_with_a_percent_sign(name: str, compiler: Compiler) -> None:
    schema = {"$ref": f"#/$defs/{name}", "$defs": {name: {"type": "integer"}}}
    assert accepts(compiler, grammar(guided_json=schema), "5")
    assert not accepts(compiler, grammar(guided_json=schema), '"a"')


def test_what_need_not_be_there_is_not_counted(compiler: Compiler) -> None:
    one = {"contains": {"type": "integer"}, "minContains": 0}
    for counts in (one, {"minContains": 0}, {"minContains": 2, "maxContains": 3}):
        text = grammar(guided_json={"items": {"type": "array", **counts}, "type": "array"})
        assert accepts(compiler, text, '[["a"]]')
        assert not accepts(compiler, text, '["a"]')
    older = {"$schema": DIALECTS[2]}  # contains asks for one there, whatever is written beside it
    for more in ({"maxContains": 1}, {"minContains": 1}, older):
        with pytest.raises(GrammarError, match="contains"):
            accepts(compiler, grammar(guided_json={"type": "array", **one, **more}), "[]")


def test_schemas_that_may_be_true_together_are_refused_in_clear_words(compiler: Compiler) -> None:
    apart = grammar(guided_json={"oneOf": [{"type": "integer"}, {"type": "string"}]})
    assert accepts(compiler, apart, "5")
    with pytest.raises(GrammarError) as caught:
        compiler.compile(grammar(guided_json={"oneOf": [{"type": "integer"}, {"type": "number"}]}))
    told = in_clear(str(caught.value))
    assert told.startswith("oneOf is supported where")
    assert "coerce" not in told
    assert in_clear("another") == "another"


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-(1 << 63), (1 << 63) - 1), (0, (1 << 64) - 1), (0, 1.8446744073709552e19), (-1e30, 1e30)],
)
def test_bounds_of_64_bits(kind: str, low: float, high: float, compiler: Compiler) -> None:
    """As Rust's and Go's generators write them of a type's own range."""
    text = grammar(guided_json={"type": kind, "minimum": low, "maximum": high})
    assert accepts(compiler, text, "5")
    assert accepts(compiler, text, "-5") == (low < 0)
    with pytest.raises(GrammarError):
        accepts(compiler, grammar(guided_json={"type": kind, "minimum": 1e300}), "5")


def test_choices_of_any_character(compiler: Compiler) -> None:
    text = grammar(guided_choice=["a\x7f", "b\u2028"])
    assert accepts(compiler, text, "a\x7f")
    assert accepts(compiler, text, "b\u2028")


def test_formats_that_json_schema_does_not_know_say_nothing(compiler: Compiler) -> None:
    """OpenAPI's, pydantic's and zod's, wherever they stand; those that it knows are kept to, or refused."""
    path = {"type": "string", "format": "path"}
    properties = {
        "format": path,  # a name like any other
        "list": {"type": "array", "items": path},
        "maybe": {"anyOf": [path, {"type": "null"}]},
        "number": {"format": "int64"},
        "other": {"$ref": "#/$defs/p"},
    }
    schema = {"type": "object", "properties": properties, "required": [*properties], "$defs": {"p": path}}
    document = {"format": "a b", "list": ["c"], "maybe": None, "number": 5, "other": "d"}
    assert accepts(compiler, grammar(guided_json=schema), json.dumps(document))
    assert not accepts(compiler, grammar(guided_json=schema), json.dumps(document | {"format": 5}))
    uuid = grammar(guided_json={"type": "string", "format": "uuid"})
    assert not accepts(compiler, uuid, '"a b"')
    with pytest.raises(GrammarError, match="uri-reference"):
        accepts(compiler, grammar(guided_json={"type": "string", "format": "uri-reference"}), '"a"')


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"guided_json": OBJECT, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "give one of them",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "more than one"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "required",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": "json_object"}, "response_format", "response_format"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": [""]}, "guided_choice", "at least 1"),
        ({"guided_regex": ""}, "guided_regex", "at least 1"),
        ({"guided_regex": 5}, "guided_regex", "string"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], param: str, why: str) -> None:
    with pytest.raises(ApiError, match=why) as caught:
        asked(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"guided_json": "{"}, "not JSON"),
        ({"guided_json": "[" * 100_000}, "not JSON"),
        ({"guided_json": '{"a": NaN}'}, "number that JSON does not know"),
        ({"guided_json": " " * (GRAMMAR_BYTES_MAX + 1)}, "bytes"),
        ({"guided_json": {"enum": ["x" * GRAMMAR_BYTES_MAX]}}, "bytes"),
        ({"guided_regex": "x" * (SOURCE_BYTES_MAX + 1)}, "bytes"),
        ({"guided_grammar": "x" * (SOURCE_BYTES_MAX + 1)}, "bytes"),
        ({"guided_choice": ["x" * SOURCE_BYTES_MAX]}, "bytes"),
        ({"guided_grammar": "S -> a"}, "neither Lark nor GBNF"),
    ],
)
def test_what_is_too_large_or_not_readable_says_so(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        grammar(**fields)


def test_depth_is_bounded() -> None:
    deep: Any = {}
    for depth in range(1, DEPTH_MAX + 1):
        assert depth_of(deep) == depth
        json_grammar(deep if isinstance(deep, dict) else {})
        deep = {"items": deep}
    with pytest.raises(GrammarError, match=f"nested {DEPTH_MAX + 1} deep"):
        json_grammar(deep)
    assert depth_of(5) == 0
    assert depth_of([[], {"a": [1]}]) == 3
