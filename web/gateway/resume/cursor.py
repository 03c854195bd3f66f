"""How far a client has come in a stream: what every event id ends with (pure).

One entry for each choice, joined by "-": nothing when no event of it was sent, else its tokens in decimal, with an "f"
after its last one; and of a model that reasons how many of all were reasoning, for the usage: nothing else of it is
computed again. A "u" at the end: the usage was sent, too. So "12" or "3-17f-" or "8f-9f4u".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from web.gateway.errors import ApiError
from web.gateway.openai.requests import CHOICES_MAX

CURSOR_MAX = 20 * CHOICES_MAX  # characters
_ENTRY = r"(?:\d{1,9}(?:f(?:\d{1,9})?)?)?"
_GRAMMAR = re.compile(rf"{_ENTRY}(?:-{_ENTRY})*u?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mark:
    """Of one choice."""

    tokens: int
    finished: bool = False
    reasoning_tokens: int = 0  # of one that is finished

    @classmethod
    def parse(cls, text: str) -> Mark:
        tokens, end, reasoning = text.partition("f")
        return cls(int(tokens), bool(end), int(reasoning or 0))

    def __str__(self) -> str:
        return f"{self.tokens}f{self.reasoning_tokens or ''}" if self.finished else str(self.tokens)


@dataclass(slots=True)
class Cursor:
    marks: list[Mark | None]  # None: nothing of the choice has been sent
    usage: bool = False

    def has_all(self, index: int) -> bool:
        """Whether the client has all of a choice."""
        mark = self.marks[index] if index < len(self.marks) else None
        return mark is not None and mark.finished

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ApiError 400."""
        if len(text) > CURSOR_MAX or not _GRAMMAR.fullmatch(text):
            raise ApiError(400, "Last-Event-ID: this is not an event id as it was sent")
        entries = text.removesuffix("u").split("-")
        if len(entries) > CHOICES_MAX:
            text = (
                f"Last-Event-ID: it is of {len(entries)} choices, and no request has more than {CHOICES_MAX}"
            )
            raise ApiError(400, text)
        marks = [Mark.parse(entry) if entry else None for entry in entries]
        return cls(marks, text.endswith("u"))

    def __str__(self) -> str:
        return "-".join("" if mark is None else str(mark) for mark in self.marks) + (
            "u" if self.usage else ""
        )
