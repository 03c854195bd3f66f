"""How much of a text has to wait, since it may be the beginning of something else (pure)."""

from __future__ import annotations

from collections.abc import Sequence


def possible_start(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `marks` begins, and which is not all of it."""
    longest, size = 0, len(text)
    for mark in marks:
        at = text.find(mark[0], max(0, size - len(mark) + 1))
        while at >= 0 and not mark.startswith(text[at:]):
            at = text.find(mark[0], at + 1)
        if at >= 0:
            longest = max(longest, size - at)
    return longest


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of `marks` begins in `text`, and which; None: none is there."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found, default=None)
