"""Work as what is executed, not as time: a busy machine changes nothing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def _collector_off() -> Iterator[None]:
    """When it comes depends on what ran before, and it calls others: Hypothesis leaves a callback with it for good."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def calls(body: Callable[[], object]) -> int:
    """Functions that `body` calls, also those that are not Python's."""
    count = 0

    def note(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    with _collector_off():
        sys.setprofile(note)
        try:
            body()
        finally:
            sys.setprofile(before)
    return count


def lines(body: Callable[[], object]) -> int:
    """Lines of Python that `body` executes: also those of loops that call nothing."""
    count = 0

    def note(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return note

    before = sys.gettrace()
    with _collector_off():
        sys.settrace(note)
        try:
            body()
        finally:
            sys.settrace(before)
    return count


def lines_of_pieces(pieces: Generator[None, None, T]) -> tuple[list[int], T]:
    """The lines of each piece, the last one included, and the generator's result."""
    costs: list[int] = []
    done: list[T] = []

    def piece() -> None:
        try:
            next(pieces)
        except StopIteration as end:
            done.append(end.value)

    while not done:
        costs.append(lines(piece))
    return costs, done[0]
