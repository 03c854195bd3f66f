"""Grammars of outputs that have to call tools, or may: what each family writes, as llguidance reads it (pure).

Reasoning goes before, where the model reasons and the prompt does not say that it has. What is made here reads back
through the family's parser: names are of the request's tools, arguments keep to their schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from controlplane.contract.requests import GRAMMAR_BYTES_MAX
from controlplane.grammar import GrammarError
from web.gateway.openai.structured import DEPTH_MAX, WHITESPACE, adapted, depth_of
from web.gateway.openai.tools import Function
from web.gateway.text.parsers.output import ToolFormat
from web.gateway.text.parsers.reasoning import ReasoningMarks

DEFINITIONS = ("$defs", "definitions")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SPACE_AFTER_REASONING = "/[ \\n]{0,4}/"
_PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True, slots=True)
class Calls:
    """`calls_max`: None: any number, but one at least. `must`: there is no other answer."""

    kind: ToolFormat
    functions: Sequence[Function]
    calls_max: int | None = None
    must: bool = True


@dataclass(frozen=True, slots=True)
class Reasoning:
    """`inside`: the prompt ends within it; else it may be left out."""

    marks: ReasoningMarks
    inside: bool


def output_grammar(
    answer: str, calls: Calls | None, reasoning: Reasoning | None, special: Mapping[str, int]
) -> str:
    """The grammar of all that a model may say. `answer`: the answer's own ("": there is none, or it may be anything
    and `calls` must come); `special`: marks that are special tokens, by name. Raises GrammarError.
    """
    rules = _Rules(special)
    bodies = []
    if calls is not None:
        bodies.append("calls")
        rules.calls(calls)
    if answer and not (calls and calls.must):
        bodies.append("@answer")
    start = rules.add("body", " | ".join(bodies))
    if reasoning is not None:
        start = f"{rules.reasoning(reasoning)} {start}"
    text = f"start: {start}\n{rules.text}"
    if "@answer" in bodies:
        if start == "body" and bodies == ["@answer"]:
            text = answer
        else:
            text = json.dumps(
                {"grammars": [{"lark_grammar": text}, *_named(answer)]},
                ensure_ascii=False,
                separators=(",", ":"),
            )
    if (size := len(text.encode(errors="surrogatepass"))) > GRAMMAR_BYTES_MAX:
        raise GrammarError(f"it makes a grammar of {size} bytes, at most {GRAMMAR_BYTES_MAX} are taken")
    return text


def _named(answer: str) -> list[dict[str, Any]]:
    """The grammars of `answer`, the first of which is called so."""
    if answer.lstrip().startswith("{"):
        first, *others = json.loads(answer)["grammars"]
        return [first | {"name": "answer"}, *others]
    return [{"name": "answer", "lark_grammar": answer}]


class _Rules:
    """Rules of one Lark grammar."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    def add(self, name: str, body: str) -> str:
        self._lines.append(f"{name}: {body}")
        return name

    def mark(self, name: str) -> str:
        """A special token has no text that a grammar could match."""
        return f"<[{self._special[name]}]>" if name in self._special else _quoted(name)

    def reasoning(self, reasoning: Reasoning) -> str:
        marks = reasoning.marks
        if marks.end in self._special:
            self.add("thought", f"/(.|\\n)*/ {self.mark(marks.end)}")
        else:
            self.add("thought[lazy]", f"/(.|\\n)*{re.escape(marks.end).replace('/', chr(92) + '/')}/")
        if reasoning.inside:
            return f"thought {SPACE_AFTER_REASONING}"
        self.add("reasoning", f"{self.mark(marks.begin)} thought {SPACE_AFTER_REASONING}")
        return "reasoning?"

    def calls(self, calls: Calls) -> None:
        many = calls.calls_max is None
        if calls.calls_max not in (None, 1):
            raise ValueError("calls are bounded by one, or not at all")

        def repeated(between: str) -> str:
            return f"call ({between} call)*" if many else "call"

        one: Callable[[int, Function], str]
        match calls.kind:
            case ToolFormat.HERMES:
                begin, end = self.mark("<tool_call>"), self.mark("</tool_call>")
                self.add("calls", repeated('"\\n"'))
                self.add("call", f'{begin} "\\n" one "\\n" {end}')
                one = self._object("arguments")
            case ToolFormat.LLAMA_JSON:
                self.add("calls", repeated('"; "'))
                self.add("call", "one")
                one = self._as_json
            case ToolFormat.PYTHONIC:
                self.add("calls", f'"[" {repeated(chr(34) + ", " + chr(34))} "]"')
                self.add("call", "one")
                one = self._python
            case ToolFormat.MISTRAL:
                between = '", "'
                self.add("calls", f'{self.mark("[TOOL_CALLS]")} " "? "[" {repeated(between)} "]"')
                self.add("call", "one")
                one = self._object("arguments")
            case ToolFormat.MISTRAL_NAMED | ToolFormat.MISTRAL_ARGS:
                args = f" {self.mark('[ARGS]')}" if calls.kind is ToolFormat.MISTRAL_ARGS else ""
                self.add("calls", "call+" if many else "call")
                self.add("call", f"{self.mark('[TOOL_CALLS]')} one")
                one = self._after_name(args)
            case _:
                assert_never(calls.kind)
        self.add("one", " | ".join(one(at, function) for at, function in enumerate(calls.functions)))

    def _object(self, key: str) -> Callable[[int, Function], str]:
        def one(at: int, function: Function) -> str:
            head = f'{{"name": {json.dumps(function.name)}, "{key}": '
            return self.add(f"f{at}", f'{_quoted(head)} {self._arguments(at, function)} "}}"')

        return one

    def _as_json(self, at: int, function: Function) -> str:
        """As one document: an answer that is JSON may begin the same way, and a longer first word would hide it."""
        parameters = parameters_of(function)
        shared = {key: parameters.pop(key) for key in DEFINITIONS if key in parameters}
        properties = {"name": {"const": function.name}, "parameters": parameters}
        whole = {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "additionalProperties": False,
        }
        return self.add(f"f{at}", _json(whole | shared))

    def _after_name(self, between: str) -> Callable[[int, Function], str]:
        def one(at: int, function: Function) -> str:
            return self.add(f"f{at}", f"{_quoted(function.name)}{between} {self._arguments(at, function)}")

        return one

    def _arguments(self, at: int, function: Function) -> str:
        return self.add(f"a{at}", _json(parameters_of(function)))

    def _python(self, at: int, function: Function) -> str:
        """Values are JSON, which is Python but for three words, and the parser knows these."""
        schema = parameters_of(function)
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise GrammarError(f"the parameters of {function.name} are no JSON schema")
        for name in (function.name, *properties):
            if not _PYTHON_NAME.fullmatch(name):
                raise GrammarError(f"this model writes calls as Python, which has no word like {name!r:.80}")
        if set(required) - set(properties):
            raise GrammarError(f"the parameters of {function.name} require what is none of their properties")
        shared = {key: schema[key] for key in DEFINITIONS if key in schema}
        # a: nothing has been written yet; b: a comma goes before the next one.
        for k, (name, value) in enumerate(properties.items()):
            if not isinstance(value, dict):
                value = {} if value is True else {"not": {}}
            self.add(f"v{at}_{k}", f"{_quoted(name + '=')} {self.add(f'w{at}_{k}', _json(value | shared))}")
            skip = "" if name in required else " | {}" + f"{at}_{k + 1}"
            self.add(f"a{at}_{k}", f"v{at}_{k} b{at}_{k + 1}{skip.format('a')}")
            self.add(f"b{at}_{k}", f'", " v{at}_{k} b{at}_{k + 1}{skip.format("b")}')
        for kind in "ab":
            self.add(f"{kind}{at}_{len(properties)}", '""')
        return self.add(f"f{at}", f'{_quoted(function.name + "(")} a{at}_0 ")"')


def parameters_of(function: Function) -> dict[str, Any]:
    """Of an object, always. Raises GrammarError."""
    given = NO_PARAMETERS if function.parameters is None else function.parameters
    schema = {key: value for key, value in given.items() if value is not None}
    if schema.setdefault("type", "object") != "object":
        raise GrammarError(f"the parameters of {function.name} are no object")
    if depth_of(schema) > DEPTH_MAX:
        raise GrammarError(f"the parameters of {function.name} are nested too deep (at most {DEPTH_MAX})")
    return schema


def _json(schema: dict[str, Any]) -> str:
    own = schema.get("x-guidance")
    guidance = {**WHITESPACE, **(own if isinstance(own, dict) else {})}
    try:
        held = {**adapted(schema), "x-guidance": guidance}
        return f"%json {json.dumps(held, allow_nan=False)}"
    except ValueError as error:
        raise GrammarError("a schema has a number that JSON does not know") from error


def _quoted(text: str) -> str:
    return json.dumps(text)
