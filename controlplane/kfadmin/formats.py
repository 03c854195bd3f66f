"""How answers are printed: `-o table|wide|json|yaml|jsonl|name`, the same for every verb."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")  # strings that YAML reads as such without quotes ...
NOT_PLAIN = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n", "none", "nan", "inf"})


class Output(StrEnum):
    TABLE = "table"
    WIDE = "wide"  # a table with more columns
    JSON = "json"
    YAML = "yaml"
    JSONL = "jsonl"  # one line of JSON for each item
    NAME = "name"  # one name a line

    @property
    def for_people(self) -> bool:
        return self in (Output.TABLE, Output.WIDE)


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print.")]


@dataclass(frozen=True, slots=True)
class View:
    """One answer, in every form."""

    value: Any  # whole, as JSON and YAML have it
    draw: Callable[[bool], None]  # prints a table; True: a wide one
    items: Sequence[Any] | None = None  # for JSON lines; None: the value is one
    names: Sequence[str] = ()


def show(view: View, output: Output) -> None:
    """Print it on stdout."""
    match output:
        case Output.TABLE | Output.WIDE:
            view.draw(output is Output.WIDE)
        case Output.JSON:
            print(msgspec.json.format(msgspec.json.encode(view.value), indent=2).decode())
        case Output.YAML:
            print(to_yaml(msgspec.to_builtins(view.value)))
        case Output.JSONL:
            for item in [view.value] if view.items is None else view.items:
                print(msgspec.json.encode(item).decode())
        case Output.NAME:
            for name in view.names:
                print(name)


def shown(view: View, output: Output) -> str:
    """What `show` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        show(view, output)
    return text.getvalue()


def to_yaml(value: Any) -> str:
    """Builtins (of JSON) as a YAML document. Strings that are no plain words are quoted as in JSON: YAML reads that."""
    return "\n".join(_lines(value))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _entry(f"{_scalar(str(key))}:", item)
    elif isinstance(value, list | tuple) and value:
        for item in value:
            lines = list(_lines(item))
            yield f"- {lines[0]}"
            yield from (f"  {line}" for line in lines[1:])
    else:
        yield _scalar(value)


def _entry(head: str, item: Any) -> Iterator[str]:
    if isinstance(item, dict | list | tuple) and item:
        yield head
        yield from (f"  {line}" for line in _lines(item))
    else:
        yield f"{head} {_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NOT_PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)
