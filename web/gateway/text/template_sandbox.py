"""The Jinja environment that chat templates are written for, transformers' own, with bounded work (pure).

What that one has, this one has: the same tags, filters, functions and arguments. A template comes with the model, not
from clients, but the messages it loops over do come from them, so work is counted while it is done.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

WORK_MAX = 200_000  # look-ups, calls and pieces of output of one rendering, about a microsecond each
REPEAT_MAX = 1_000_000  # characters or items that one multiplication may make
BASE_MAX, EXPONENT_MAX = 1_000_000, 64  # of a power
COPIED_CHARS_PER_WORK = 4096
COPIED_ITEMS_PER_WORK = 1024
FILTERED_PER_WORK = 8
LOOPED_PER_WORK = 8


class _Work(threading.local):
    """Long conversations are rendered in threads."""

    left = WORK_MAX


class _Generator(CodeGenerator):
    """Counts what templates do without asking their environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        counted = nodes.EnvironmentAttribute("counted")
        node.iter = nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.charged(")
        super().visit_Concat(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self.write("environment.charged(")
        super().visit_Getitem(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """`{% generation %}` marks what training counts as the model's own; it renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._work = _Work()
        self.filters = {name: self._charging(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def begin(self) -> None:
        """A rendering begins in this thread."""
        self._work.left = WORK_MAX

    def spend(self, work: int = 1) -> None:
        self._work.left -= work
        if self._work.left < 0:
            raise SecurityError("the chat template does too much work for these messages")

    def charged(self, value: Any) -> Any:
        """What was made by copying."""
        if isinstance(value, str):
            self.spend(len(value) // COPIED_CHARS_PER_WORK)
        elif isinstance(value, list | tuple):
            self.spend(len(value) // COPIED_ITEMS_PER_WORK)
        return value

    def counted(self, values: Any) -> Any:
        """What a loop goes over."""
        if isinstance(values, Sized):
            self.spend(len(values) // LOOPED_PER_WORK)
            return values
        return self._counting(iter(values))

    def _counting(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend()
            yield value

    def _charging(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charging(*args: Any, **kwargs: Any) -> Any:
            # Jinja passes an environment or a context first to those filters that want one.
            self.spend(
                1 + sum(len(a) for a in args[:2] if isinstance(a, str | list | tuple)) // FILTERED_PER_WORK
            )
            return self.charged(function(*args, **kwargs))

        return charging

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.spend()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, range):
            self.spend(len(result))  # the loop over it costs this much, even if its body is empty
        return self.charged(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend()
        if operator == "**" and not (abs(left) <= BASE_MAX and abs(right) <= EXPONENT_MAX):
            raise SecurityError("the chat template computes too large a power")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                too_long = isinstance(value, str | list | tuple) and isinstance(times, int)
                if too_long and len(value) * times > REPEAT_MAX:
                    raise SecurityError("the chat template repeats something too often")
        return self.charged(super().call_binop(context, operator, left, right))


def _raise_exception(message: str) -> NoReturn:
    """Templates refuse messages with this ("roles must alternate")."""
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict` without its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store {name!r} in a namespace")
