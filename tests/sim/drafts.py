"""Drafts in simulated clusters: of what each request will say, with an error now and then.

The oracle's tokens do not repeat, so nothing that a request has said would be a draft that is right."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator, Sequence
from unittest import mock

import dataplane.core.speculation
from dataplane.core.request import Request
from tests.sim.requests import TEMPLATES, expected, template

EVERY, FROM = 3, 1  # one seed of so many has drafts
WRONG = 0.2  # of them


def has_drafts(seed: int) -> bool:
    return seed % EVERY == FROM


@functools.cache
def _numbers() -> dict[tuple[tuple[int, ...], int], int]:
    """Templates by what a request shows of them."""
    made = {number: template(number) for number in range(TEMPLATES)}
    return {(one.prompt, one.sampling.seed): number for number, one in made.items()}


class Guesser:
    def pass_s(self, requests: int) -> float:
        return 0.0

    def __init__(self, stages: int) -> None:
        self._stages = stages

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        return [self._guess(request, count) for request in requests]

    def _guess(self, request: Request, count: int) -> list[int]:
        number = _numbers().get((tuple(request.ids[: request.prompt_len]), request.sampling.seed))
        if number is None:
            return []
        at = request.total - request.prompt_len
        chance = random.Random(request.rid + at)
        tokens = expected(number, self._stages)[0][at : at + count]
        return [token ^ 1 if chance.random() < WRONG else token for token in tokens]

    def forget(self, rid: int) -> None:
        pass


@contextlib.contextmanager
def guessed(stages: int) -> Iterator[None]:
    """The engine's drafts are those of `Guesser`."""
    with mock.patch.object(dataplane.core.speculation, "NgramProposer", return_value=Guesser(stages)):
        yield
