"""Chat templates: the model's own Jinja text, in Jinja's sandbox, with bounded work and size (pure).

A template comes with the model, not from clients, but the messages it loops over do come from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from controlplane.contract.errors import ConfigError, RequestError

WORK_MAX = 200_000  # attribute look-ups, calls and pieces of output of one rendering
REPEAT_MAX = 1_000_000  # characters or items that one multiplication may make


class _Environment(ImmutableSandboxedEnvironment):
    """Counts the work of the rendering in progress (renderings do not await, so they never overlap)."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.work_left = WORK_MAX

    def spend(self, work: int = 1) -> None:
        self.work_left -= work
        if self.work_left < 0:
            raise SecurityError("the chat template does too much work for these messages")

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
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend()
        if operator == "**":
            raise SecurityError("a chat template may not use **")
        for value, times in ((left, right), (right, left)):
            too_long = isinstance(value, str | list | tuple) and isinstance(times, int)
            if too_long and len(value) * times > REPEAT_MAX:
                raise SecurityError("the chat template repeats something too often")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    """Templates refuse messages with this ("roles must alternate")."""
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class ChatTemplate:
    """One compiled template. Raises ConfigError if it is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], chars_max: int) -> None:
        self._environment = _Environment()
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._special_tokens = dict(special_tokens)
        self._chars_max = chars_max
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages` (role, content). Raises RequestError if the template refuses them."""
        self._environment.work_left = WORK_MAX
        pieces: list[str] = []
        left = self._chars_max
        try:
            # `generate` and not `render`: a runaway output is stopped while it is made.
            for piece in self._template.generate(
                **self._special_tokens,
                **(extra or {}),
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            ):
                self._environment.spend()
                left -= len(piece)
                if left < 0:
                    raise RequestError(
                        f"the prompt made from these messages exceeds {self._chars_max} characters"
                    )
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            text = str(error)[:300] or type(error).__name__
            raise RequestError(f"the model's chat template refuses these messages: {text}") from error
        return "".join(pieces)
