"""How much of a text has to wait, since it may be the beginning of something else (pure)."""

from __future__ import annotations

from collections.abc import Sequence


def possible_start(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `marks` begins, and which is not all of it."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of `marks` begins in `text`, and which; None: none is there."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found, default=None)
