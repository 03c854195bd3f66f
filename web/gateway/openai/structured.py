"""Structured output: what a request says its answer has to look like, and the grammar that holds it to that.

OpenAI's response_format, vLLM's structured_outputs, and its older guided_json, guided_regex, guided_choice and
guided_grammar. What is asked for becomes one text of llguidance's (`controlplane/grammar.py`). Pure; `grammar_check.py`
has the check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import quote

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark
from pydantic import Field

from controlplane.contract.requests import GRAMMAR_BYTES_MAX
from controlplane.grammar import GrammarError
from web.gateway.errors import ApiError
from web.gateway.openai.patterns import readable_pattern
from web.gateway.openai.strict import Lenient, Strict

DEPTH_MAX = 64  # of objects and lists in a schema
# A regular expression or a grammar says more in fewer bytes than a schema does: with so many, a step's mask takes some
# milliseconds at most.
SOURCE_BYTES_MAX = 32 << 10
CHOICES_MAX = 4096
# Between the parts of a JSON document: a space, or a new line and what it is indented by. Where any space was allowed
# the demo model wrote empty lines without end, as models that were taught no JSON do.
WHITESPACE = {"whitespace_pattern": r"( |\n[ \t]{0,40})?"}
NO_WHITESPACE = {"whitespace_flexible": False}
ANY_OBJECT: dict[str, Any] = {"type": "object"}

# Where a schema holds others.
MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTS_OF_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
# Keywords that the library refuses, with the values by which they demand nothing: generators of schemas write them.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": ({"type": "string"}, {}, True),  # zod's records
    "dependentRequired": ({},),
    "dependencies": ({},),
    "unevaluatedProperties": ({}, True),
    "unevaluatedItems": ({}, True),
}
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
REF_CHARS = "#/%:?&=+,;@!$'()*~"
FORMATS = (  # that JSON Schema knows (2020-12, validation, 7.3)
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
)  # fmt: skip
# Those of its versions that the library knows by name; one that it does not know would be looked for on the network.
DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema", "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema", "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
)  # fmt: skip
COUNTING_DIALECTS = DIALECTS[:2]  # that know minContains and maxContains
# Values of any kind; everywhere else a null is how serialisers write a keyword that is not there.
VALUES = frozenset({"const", "default", "example"})
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
BOUND_MAX = (1 << 63) - 1024  # the library fails beyond what a double says of 64 bits
COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
SECONDS = "[0-9]{2}:[0-9]{2}:[0-5][0-9]"  # only a time has three parts, an offset has two

Schema = dict[str, Any] | bool
Source = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Source], Field(min_length=1, max_length=CHOICES_MAX, fail_fast=True)]


class JsonSchemaFormat(Lenient):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None  # every schema is kept to the letter


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict):
    """vLLM's. Exactly one of the first five."""

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: Source | None = None
    disable_fallback: bool | None = None  # there is no other engine to fall back to


class Fields(Protocol):
    """Of a request."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Schema | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None
    ignore_eos: bool | None


# What they are called, to leave them out of what is kept of a request, whose log has the grammar.
DEMANDS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_whitespace_pattern",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """One demand: the parameter that makes it, its kind, and its source."""

    param: str
    kind: Literal["json", "regex", "choice", "grammar"]
    source: Any
    whitespace: Mapping[str, Any] = field(default_factory=lambda: WHITESPACE)


def asked_of(request: Fields) -> Asked | None:
    """What a request demands of its output. Raises ApiError for more than one demand, or one that says nothing."""
    demands = [*_of_format(request.response_format), *_of_structured(request.structured_outputs)]
    white = _whitespace(None, request.guided_whitespace_pattern)
    if request.guided_json is not None:
        demands.append(Asked("guided_json", "json", request.guided_json, white))
    if request.guided_regex is not None:
        demands.append(Asked("guided_regex", "regex", request.guided_regex))
    if request.guided_choice is not None:
        demands.append(Asked("guided_choice", "choice", request.guided_choice))
    if request.guided_grammar is not None:
        demands.append(Asked("guided_grammar", "grammar", request.guided_grammar))
    if len(demands) > 1:
        first, second = demands[0].param, demands[1].param
        text = (
            f"{second} holds more than one demand on the output"
            if first == second
            else f"{first} and {second} both say what the output has to be: give one of them"
        )
        raise ApiError(400, text, second)
    return demands[0] if demands else None


def text_of(asked: Asked) -> str:
    """The grammar as llguidance reads it. Raises GrammarError."""
    match asked.kind:
        case "json":
            text = json_grammar(asked.source, asked.whitespace)
        case "regex":
            text = LLMatcher.grammar_from_regex(
                readable_pattern(_bounded(asked.source), "the pattern", False)
            )
        case "choice":
            choices = " | ".join(map(_literal, asked.source))
            # A terminal: of rules there may be 2,000 at a place.
            text = _bounded(f"start: CHOICE\nCHOICE: {choices}")
        case "grammar":
            try:
                text = any_to_lark(_bounded(asked.source))
            except GrammarError:
                raise
            except Exception as error:  # the library raises no narrower type for what it cannot read
                raise GrammarError(f"neither Lark nor GBNF: {' '.join(str(error).split())[:300]}") from error
    if _size(text) > GRAMMAR_BYTES_MAX:
        raise GrammarError(f"it has {_size(text)} bytes, at most {GRAMMAR_BYTES_MAX} are taken")
    return text


def json_grammar(schema: Schema | str, whitespace: Mapping[str, Any] = WHITESPACE) -> str:
    """Documents of a JSON schema, given as such or as its text. Raises GrammarError."""
    if isinstance(schema, str):
        if _size(schema) > GRAMMAR_BYTES_MAX:
            raise GrammarError(f"it has {_size(schema)} bytes, at most {GRAMMAR_BYTES_MAX} are taken")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"it is not JSON: {error}") from error
    if (depth := depth_of(schema)) > DEPTH_MAX:
        raise GrammarError(f"it is nested {depth} deep, at most {DEPTH_MAX} is taken")
    if isinstance(schema, dict):
        own = schema.get("x-guidance")
        schema = adapted(schema) | {"x-guidance": {**whitespace, **(own if isinstance(own, dict) else {})}}
    elif schema is True:
        schema = {"x-guidance": dict(whitespace)}
    try:
        return json.dumps(
            {"grammars": [{"json_schema": schema}]},
            ensure_ascii=False,
            separators=(",", ":"),
            allow_nan=False,
        )
    except ValueError as error:
        raise GrammarError("it has a number that JSON does not know") from error


def adapted(schema: Any, draft: str | None = None) -> Any:
    """A schema of `draft` (None: its own) as llguidance is to have it: its times without a 60th second, which the
    library writes at any minute and clients' types do not read; its patterns in Rust's words; and without what demands
    nothing but is refused by the library: formats that JSON Schema does not know (OpenAPI's, pydantic's, zod's),
    keywords with NEUTRAL values, or null. Raises GrammarError."""
    if not isinstance(schema, dict):
        return schema
    if draft is None:
        draft = _readable("$schema", schema.get("$schema") or DIALECTS[0])
    schema = {
        key: _readable(key, value) for key, value in schema.items() if value is not None or key in VALUES
    }
    changed = dict(schema)
    for key, inner in schema.items():
        if key in MAPS_OF_SCHEMAS and isinstance(inner, dict):
            named = _readable_names(inner) if key == "patternProperties" else inner
            changed[key] = {name: adapted(one, draft) for name, one in named.items()}
        elif key in LISTS_OF_SCHEMAS and isinstance(inner, list):
            changed[key] = [adapted(one, draft) for one in inner]
        elif key in SCHEMAS:
            changed[key] = adapted(inner, draft)
        elif any(type(inner) is type(value) and inner == value for value in NEUTRAL.get(key, ())):
            del changed[key]
    if draft in COUNTING_DIALECTS:
        _without_idle_counts(changed)
    named = schema.get("format")
    if isinstance(named, str) and named not in FORMATS:
        del changed["format"]
    if named in ("time", "date-time"):
        if "pattern" in schema:
            return {"allOf": [changed, {"type": "string", "pattern": SECONDS}]}
        changed["pattern"] = SECONDS
    return changed


def _readable_names(patterns: dict[str, Any]) -> dict[str, Any]:
    names = [readable_pattern(name, "patternProperties", True) for name in patterns]
    if len(set(names)) < len(names):
        raise GrammarError("patternProperties has one pattern in two ways of writing")
    return dict(zip(names, patterns.values(), strict=True))


def _without_idle_counts(schema: dict[str, Any]) -> None:
    """minContains and maxContains count what `contains` asks for, and none of it need be there for minContains: 0."""
    if "contains" in schema and schema.get("minContains") == 0 and "maxContains" not in schema:
        del schema["contains"]
    if "contains" not in schema:
        for key in ("minContains", "maxContains"):
            schema.pop(key, None)


def _readable(key: str, value: Any) -> Any:
    """The value of a keyword, as the library reads it where others write it in another way."""
    if key == "$ref" and isinstance(value, str):
        # Names of definitions as they stand: List<T>, with spaces, or with a % that begins no escape.
        return quote(_BARE_PERCENT.sub("%25", value), safe=REF_CHARS)
    if key == "pattern" and isinstance(value, str):
        return readable_pattern(value, key, True)
    if key == "$schema" and isinstance(value, str):
        return next((name for name in DIALECTS if _same_dialect(name, value)), DIALECTS[0])
    if isinstance(value, bool):
        return value
    if key in COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    if key in BOUNDS and isinstance(value, int | float):
        if key.endswith("inimum"):
            return -BOUND_MAX if value < -BOUND_MAX else value
        return BOUND_MAX if value > BOUND_MAX else value
    return value


def _same_dialect(name: str, given: str) -> bool:
    return name.partition("://")[2] == given.partition("://")[2].rstrip("#/")


def depth_of(value: Any) -> int:
    """Of objects and lists in one another, at most DEPTH_MAX + 1."""
    level = [value]
    for depth in range(DEPTH_MAX + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return depth
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return DEPTH_MAX + 1


def _of_format(given: ResponseFormat | None) -> list[Asked]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [Asked("response_format", "json", ANY_OBJECT)]
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise ApiError(400, "response_format: json_schema.schema is required", "response_format")
    return [Asked("response_format", "json", given.json_schema.schema_)]


def _of_structured(given: StructuredOutputs | None) -> list[Asked]:
    if given is None:
        return []
    param, white = "structured_outputs", _whitespace(given.disable_any_whitespace, given.whitespace_pattern)
    demands = []
    if given.json_ is not None:
        demands.append(Asked(param, "json", given.json_, white))
    if given.json_object:
        demands.append(Asked(param, "json", ANY_OBJECT, white))
    if given.regex is not None:
        demands.append(Asked(param, "regex", given.regex))
    if given.choice is not None:
        demands.append(Asked(param, "choice", given.choice))
    if given.grammar is not None:
        demands.append(Asked(param, "grammar", given.grammar))
    if not demands:
        raise ApiError(400, f"{param} needs one of json, json_object, regex, choice and grammar", param)
    return demands


def _whitespace(none: bool | None, pattern: str | None) -> Mapping[str, Any]:
    if none:
        return NO_WHITESPACE
    return WHITESPACE if pattern is None else {"whitespace_pattern": pattern}


def _literal(text: str) -> str:
    """In Lark, whose reader takes no raw DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _bounded(source: str) -> str:
    if _size(source) > SOURCE_BYTES_MAX:
        raise GrammarError(f"it has {_size(source)} bytes, at most {SOURCE_BYTES_MAX} are taken")
    return source


def _size(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
