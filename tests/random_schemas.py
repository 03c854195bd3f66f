"""Random JSON schemas of the kinds that llguidance claims, each with an end in sight."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

PATTERNS = ("^[a-z]{2,6}$", "^(north|south)-[0-9]{1,3}$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "^x?y+z$")
FORMATS = ("date", "time", "uuid", "ipv4", "date-time")
WORDS = ("name", "kind", "size", "first name", "größe", "a/b", 'q"uote', "x", "list", "when")


def random_schema(rng: random.Random) -> Schema:
    """With definitions that it may refer to."""
    definitions = {f"d{i}": _schema(rng, 1, []) for i in range(2)}
    schema = _object(rng, 3, list(definitions)) if rng.random() < 0.7 else _schema(rng, 3, list(definitions))
    return schema | {"$defs": definitions}


def _schema(rng: random.Random, depth: int, names: list[str]) -> Schema:
    leaves = [_string, _integer, _number, _enum, _const, _plain]
    inner = [_object, _array, _any_of, _tuple, _all_of] if depth > 0 else []
    kind = rng.choice([*leaves, *inner, *inner])
    if names and rng.random() < 0.15:
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    return kind(rng, depth - 1, names)


def _string(rng: random.Random, _depth: int, _names: list[str]) -> Schema:
    match rng.randrange(3):
        case 0:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)}


def _integer(rng: random.Random, _depth: int, _names: list[str]) -> Schema:
    low = rng.randrange(-1000, 1000)
    high = low + rng.randrange(1, 5000)
    if rng.random() < 0.3:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1}
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(rng: random.Random, _depth: int, _names: list[str]) -> Schema:
    low = round(rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(1, 90), 2)}


def _enum(rng: random.Random, _depth: int, _names: list[str]) -> Schema:
    values: list[Any] = ["red", "light blue", "é\n", 3, -2.5, True, None, [1, "a"], {"k": []}]
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _const(rng: random.Random, _depth: int, _names: list[str]) -> Schema:
    return {"const": rng.choice(["fixed", 7, False, None, ["x", 1]])}


def _plain(rng: random.Random, _depth: int, _names: list[str]) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]]), "description": "said in words"}


def _object(rng: random.Random, depth: int, names: list[str]) -> Schema:
    keys = rng.sample(WORDS, rng.randrange(0, 5))
    schema: Schema = {
        "type": "object",
        "properties": {key: _schema(rng, depth, names) for key in keys},
        "required": [key for key in keys if rng.random() < 0.6],
        "additionalProperties": False,
    }
    if rng.random() < 0.2:
        schema["title"] = "A title"
    return schema


def _array(rng: random.Random, depth: int, names: list[str]) -> Schema:
    least = rng.randrange(3)
    return {
        "type": "array",
        "items": _schema(rng, depth, names),
        "minItems": least,
        "maxItems": least + rng.randrange(3),
    }


def _tuple(rng: random.Random, depth: int, names: list[str]) -> Schema:
    items = [_schema(rng, depth, names) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng: random.Random, depth: int, names: list[str]) -> Schema:
    return {"anyOf": [_schema(rng, depth, names) for _ in range(rng.randrange(2, 4))]}


def _all_of(rng: random.Random, depth: int, names: list[str]) -> Schema:
    first, second = rng.sample(WORDS, 2)
    part = {"type": "object", "properties": {first: _schema(rng, depth, names)}, "required": [first]}
    more = {"properties": {second: _schema(rng, depth, names)}}
    both = {"properties": {first: True, second: True}, "additionalProperties": False}
    return {"allOf": [part, more, both]}
