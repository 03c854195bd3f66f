"""What the answers of both APIs have in common, seen from whoever sends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from web.gateway.errors import ApiError
from web.gateway.text.choice_decoder import Piece


class AnswerFormat(Protocol):
    """How one of the two APIs writes a generation down."""

    def opening(self, index: int) -> bytes:
        """The event before the first one of choice `index`, if there is one."""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """The event for a piece of choice `index`; empty when there is nothing to show yet."""

    def long_rest(self, id_line: Callable[[], bytes]) -> Iterator[bytes] | None:
        """What follows the last `chunk` and is too long to be made in one go, with `id_line` in its last event; None:
        there is no such thing."""

    def last(self) -> bytes:
        """Events between the last piece and [DONE] (usage, when asked for)."""

    def failure(self, error: ApiError, opened: bool) -> bytes:
        """The events that end a stream which cannot go on; `opened`: its client has had `opening`."""

    def keep(self, index: int, piece: Piece) -> int:
        """Take in a piece of an answer that leaves as a whole; returns about how many bytes that keeps."""

    def body(self) -> dict[str, Any]:
        """The whole answer: of all that was kept. For `in_pieces`."""

    @property
    def heavy(self) -> bool:
        """Whether `body` takes so long that a thread is to do it."""
