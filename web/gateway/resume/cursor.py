"""How far a client has come in a stream: what every event id ends with (pure).

One entry for each choice, joined by "-": nothing when no event of it was sent, else its tokens in decimal, with an "f"
after its last one. A "u" at the end: the usage was sent, too. So "12" or "3-17f-" or "8f-9fu".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from web.gateway.errors import ApiError

CURSOR_MAX = 2048  # characters
_GRAMMAR = re.compile(r"(?:\d{1,9}f?)?(?:-(?:\d{1,9}f?)?)*u?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mark:
    """Of one choice."""

    tokens: int
    finished: bool = False

    def __str__(self) -> str:
        return f"{self.tokens}f" if self.finished else str(self.tokens)


@dataclass(slots=True)
class Cursor:
    marks: list[Mark | None]  # None: nothing of the choice has been sent
    usage: bool = False

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ApiError 400."""
        if len(text) > CURSOR_MAX or not _GRAMMAR.fullmatch(text):
            raise ApiError(400, "Last-Event-ID: this is not an event id as it was sent")
        entries = text.removesuffix("u").split("-")
        marks = [Mark(int(e.removesuffix("f")), e.endswith("f")) if e else None for e in entries]
        return cls(marks, text.endswith("u"))

    def __str__(self) -> str:
        return "-".join("" if mark is None else str(mark) for mark in self.marks) + (
            "u" if self.usage else ""
        )
