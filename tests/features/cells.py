"""What there is to play: groups of requests, settings of the engine, and faults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Literal

from tests.features.requests import Asked, alone, pairs

Weights = Literal["model", "int8", "int4"]
Drafts = Literal["off", "ngram", "draft"]
Cache = Literal["on", "off", "warm"]

STAGES = 3
TOGETHER = 24  # requests of a cell, as even as they come


class Fault(StrEnum):
    KILL = "kill of each stage"  # one after the other in one run, at three different tokens
    MOVE = "planned move"  # of one stage
    GATEWAY = "end of the gateway"  # killed, or told to stop


@dataclass(frozen=True)
class Engine:
    """`cache`: of prompts; warm: the same requests have run before, and their KV is kept."""

    weights: Weights = "model"
    drafts: Drafts = "off"
    cache: Cache = "on"

    @property
    def name(self) -> str:
        said = [
            f"{self.weights} weights" if self.weights != "model" else "",
            {"off": "", "ngram": "n-gram drafts", "draft": "drafts of a model"}[self.drafts],
            {"on": "", "off": "no prefix cache", "warm": "warm prefix cache"}[self.cache],
        ]
        return " + ".join(filter(None, said)) or "plain"


@dataclass(frozen=True)
class Cell:
    engine: Engine
    group: str
    requests: tuple[Asked, ...]
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.engine.name}; {self.group}; {self.fault}"


SINGLE = (
    Engine(weights="int8"),
    Engine(weights="int4"),
    Engine(drafts="ngram"),
    Engine(drafts="draft"),
    Engine(cache="off"),
    Engine(cache="warm"),
)
DOUBLE = (
    *(
        Engine(weights=weights, drafts=drafts)
        for weights in ("int8", "int4")
        for drafts in ("ngram", "draft")
    ),
    *(Engine(weights=weights, cache=cache) for weights in ("int8", "int4") for cache in ("off", "warm")),
    *(Engine(drafts=drafts, cache=cache) for drafts in ("ngram", "draft") for cache in ("off", "warm")),
)
WITH_DOUBLE = ("none", "json schema", "logprobs", "penalties", "n")


def groups(requests: list[Asked]) -> list[tuple[Asked, ...]]:
    """Those of about one length together, so that no run is longer than its answers."""
    ordered = sorted(requests, key=lambda asked: asked.tokens)
    count = -(-len(ordered) // TOGETHER)
    size, more = divmod(len(ordered), count)
    ends = [size * i + min(i, more) for i in range(count + 1)]
    return [tuple(ordered[first:end]) for first, end in pairwise(ends)]


@cache
def cells() -> tuple[Cell, ...]:
    """Features alone and in pairs under a plain engine, alone under each setting of it, and some under two settings."""
    singles = groups(alone())
    some = [tuple(asked for asked in alone() if asked.name in WITH_DOUBLE)]
    played = [
        *((Engine(), f"alone {i}", group) for i, group in enumerate(singles, 1)),
        *((Engine(), f"pairs {i}", group) for i, group in enumerate(groups(pairs()), 1)),
        *((engine, f"alone {i}", group) for engine in SINGLE for i, group in enumerate(singles, 1)),
        *((engine, "some", group) for engine in DOUBLE for group in some),
    ]
    return tuple(Cell(engine, name, group, fault) for fault in Fault for engine, name, group in played)
