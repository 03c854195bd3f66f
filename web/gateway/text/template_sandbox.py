"""The Jinja environment that chat templates are written for, transformers' own, with bounded work (pure).

What that one has, this one has: the same tags, filters, functions and arguments. A template comes with the model, not
from clients, but the messages it loops over do come from them, so work is counted while it is done.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Sized
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Look-ups, calls and pieces of output of one rendering, about a microsecond each: templates need them for each message.
WORK_MAX = 200_000
WORK_PER_ENTRY = 100
ENTRIES_MAX = 10_000  # what is beyond gives no more
WORK_PER_CALL = 3
PASSES_WORK_MAX = 200_000  # of what goes over all messages or a text: once for each message is too often
REPEAT_MAX = 1_000_000  # characters or items that one multiplication may make
BASE_MAX, EXPONENT_MAX = 1_000_000, 64  # of a power
COPIED_CHARS_PER_WORK = 4096
COPIED_ITEMS_PER_WORK = 512
WRITTEN_CHARS_PER_WORK = 128  # of JSON
FILTERED_PER_WORK = 8
LOOPED_PER_WORK = 8

# Filters that do not go over what they are given, and of texts those that only copy them.
AT_ONCE = frozenset({"count", "d", "default", "first", "last", "length", "random"})
COPYING = frozenset({"lower", "replace", "string", "trim", "upper"})

TOO_MUCH = "the chat template does too much work for these messages"


class _Work(threading.local):
    """Long conversations are rendered in threads."""

    left = WORK_MAX
    passes_left = PASSES_WORK_MAX


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
        self.filters = {name: self._charging(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def begin(self, entries: int = 0) -> None:
        """A rendering begins in this thread. `entries` of the conversation: messages, parts of them, calls, tools."""
        self._work.left = WORK_MAX + WORK_PER_ENTRY * min(entries, ENTRIES_MAX)
        self._work.passes_left = PASSES_WORK_MAX

    def spend(self, work: int = 1) -> None:
        self._work.left -= work
        if self._work.left < 0:
            raise SecurityError(TOO_MUCH)

    def pass_over(self, work: int) -> None:
        self._work.passes_left -= work
        if self._work.passes_left < 0:
            raise SecurityError(TOO_MUCH)

    def charged(self, value: Any) -> Any:
        """What was made by copying."""
        if isinstance(value, str):
            self.pass_over(len(value) // COPIED_CHARS_PER_WORK)
        elif isinstance(value, list | tuple):
            self.pass_over(len(value) // COPIED_ITEMS_PER_WORK)
        return value

    def counted(self, values: Any) -> Any:
        """What a loop goes over."""
        if isinstance(values, Sized):
            self.pass_over(len(values) // LOOPED_PER_WORK)
            return values
        return self._counting(iter(values))

    def _counting(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend()
            yield value

    def _charging(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        gone_over: tuple[type[Sized], ...] = (str, list, tuple)
        if name in AT_ONCE:
            gone_over = ()
        elif name in COPYING:
            gone_over = (list, tuple)

        @functools.wraps(function)
        def charging(*args: Any, **kwargs: Any) -> Any:
            self.spend()
            # Jinja passes an environment or a context first to those filters that want one.
            self.pass_over(sum(len(a) for a in args[:2] if isinstance(a, gone_over)) // FILTERED_PER_WORK)
            return self.charged(function(*args, **kwargs))

        return charging

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        self.spend()
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        self.pass_over(len(text) // WRITTEN_CHARS_PER_WORK)
        return text

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.spend()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(WORK_PER_CALL)
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
