"""Long work that gives way: a generator that yields after each small piece, and whose result is what it returns."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Pieces(Generic[T]):
    """Iterate to do them, one each; then there is `result`."""

    result: T

    def __init__(self, work: Generator[None, None, T]) -> None:
        self._work = work

    def __iter__(self) -> Iterator[None]:
        self.result = yield from self._work


def at_once(work: Generator[None, None, T]) -> T:
    """Its result, without giving way."""
    pieces = Pieces(work)
    for _ in pieces:
        pass
    return pieces.result
