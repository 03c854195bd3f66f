"""What a body asks for, checked: the same whether it comes for the first time or again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from web.gateway.openai.answer_format import AnswerFormat
from web.gateway.openai.generation import Generation, Plan
from web.gateway.openai.requests import Request
from web.gateway.text.choice_decoder import TextRules

_encode = msgspec.msgpack.Encoder().encode
NOT_IN_DIGEST = {"prompt", "messages", "request_id", "priority"}  # prompts count as tokens


class Asked(Protocol):
    """Of a body of any of the APIs. `choices` are generated for a prompt."""

    stream: bool | None
    stream_options: Any
    request_id: str | None
    priority: int | None

    @property
    def choices(self) -> int: ...

    def model_dump_json(
        self, *, by_alias: bool, exclude: Any, exclude_unset: bool, exclude_none: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """`request` without what the plans say already: prompts as tokens, the sampling."""

    request: Asked
    plans: list[Plan]
    rules: TextRules
    form: Callable[
        [Generation, str, int], AnswerFormat
    ]  # of a generation, the answer's id and its time (unix seconds)
    digest: bytes = b""  # see `digest_of`
    prompts: int = 1
    told_again: bool = False  # see Generation

    @property
    def count(self) -> int:
        """Choices of all prompts."""
        return self.prompts * self.request.choices

    @property
    def options(self) -> bytes:
        """All that a gateway needs beside the logs to go on with the answer; what `KEPT` reads."""
        return self.request.model_dump_json(
            by_alias=True,
            exclude={"stream_options": {"include_event_ids"}},
            exclude_unset=True,
            exclude_none=True,
        ).encode()

    @property
    def event_ids(self) -> bool:
        """Whether a stream's events have them."""
        options = self.request.stream_options
        return options is None or options.include_event_ids is not False


def digest_of(request: Request, plans: Sequence[Plan]) -> bytes:
    """Equal for equal answers: of the prompts' tokens, the sampling with its seeds, and what shapes the text."""
    options = request.model_dump_json(exclude=NOT_IN_DIGEST, exclude_none=True)
    return hashlib.sha256(_encode((type(request).__name__, options, plans))).digest()[:8]
