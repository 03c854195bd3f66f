"""Faults and requests of `bench failsafe`, from published traces (where they come from:
docs/decisions/failsafe-policy.md)."""

from __future__ import annotations

import csv
import itertools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

RANKS = 8  # of a group
DAY_S = 86_400.0
FAULTS, SPOT_P3, SPOT_G4DN = "infinitehbd_faults.json", "bamboo_p3_spot.csv", "bamboo_g4dn_spot.csv"
AZURE, MOONCAKE = "azure_llm_conv.csv", "mooncake_conversation.jsonl"


def data_folder() -> Path:
    """Where traces are looked for: KF_TRACES, else ../shared/data beside the project."""
    given = os.environ.get("KF_TRACES")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True, slots=True)
class Event:
    """A rank of a group goes or comes back."""

    at_s: float
    rank: int
    up: bool


@dataclass(frozen=True, slots=True)
class Group:
    """`up`: ranks that are there at the beginning."""

    up: frozenset[int]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class FaultTrace:
    name: str
    seconds: float
    groups: tuple[Group, ...]

    def window(self, start_s: float, seconds: float) -> FaultTrace:
        """A part of it, with its own second 0."""
        return FaultTrace(
            self.name, seconds, tuple(_window(group, start_s, seconds) for group in self.groups)
        )


def _window(group: Group, start_s: float, seconds: float) -> Group:
    up = set(group.up)
    for event in itertools.takewhile(lambda each: each.at_s <= start_s, group.events):
        (up.add if event.up else up.discard)(event.rank)
    events = tuple(
        Event(event.at_s - start_s, event.rank, event.up)
        for event in group.events
        if start_s < event.at_s < start_s + seconds
    )
    return Group(frozenset(up), events)


class _Fault(msgspec.Struct):
    node_id: str
    event_time: float  # days
    event_type: str


def fault_trace(folder: Path, nodes: int = 400) -> FaultTrace:
    """Each of the trace's nodes is a rank; which of them are a group is drawn once (seed 1). Faults of a node overlap:
    it is back when all have ended."""
    events = msgspec.json.decode((folder / FAULTS).read_bytes(), type=list[_Fault])
    named = sorted({each.node_id for each in events})
    places = random.Random(1).sample(range(nodes), len(named))
    place = dict(zip(named, places, strict=True))
    open_faults = dict.fromkeys(named, 0)
    groups: list[list[Event]] = [[] for _ in range(nodes // RANKS)]
    # At the same moment an end comes first: a node that fails again is down throughout.
    for each in sorted(events, key=lambda each: (each.event_time, each.event_type == "fault_start")):
        began = each.event_type == "fault_start"
        before, after = open_faults[each.node_id], max(0, open_faults[each.node_id] + (1 if began else -1))
        open_faults[each.node_id] = after
        if bool(before) != bool(after):
            group, rank = divmod(place[each.node_id], RANKS)
            groups[group].append(Event(each.event_time * DAY_S, rank, not began))
    seconds = max(each.event_time for each in events) * DAY_S
    return FaultTrace(
        "faults", seconds, tuple(Group(frozenset(range(RANKS)), tuple(each)) for each in groups)
    )


def spot_trace(folder: Path, file: str, name: str) -> FaultTrace:
    """Each node is a rank. A node that comes takes a free place, drawn with seed 1, of as many groups as the trace ever
    fills. What happens within a minute of each other has one time in the trace."""
    with (folder / file).open(newline="") as lines:
        rows = [(int(at) / 1000.0, what == "add", node) for at, what, node in csv.reader(lines)]
    here: set[str] = set()
    most = 0
    for _, up, node in rows:
        (here.add if up else here.discard)(node)
        most = max(most, len(here))
    count = most // RANKS  # nodes beyond whole groups find no place
    numbers, free = random.Random(1), list(range(count * RANKS))
    place: dict[str, int] = {}
    groups: list[list[Event]] = [[] for _ in range(count)]
    for at_s, up, node in rows:
        if up and free:
            place[node] = free.pop(numbers.randrange(len(free)))
        elif up or node not in place:
            continue
        group, rank = divmod(place[node], RANKS)
        groups[group].append(Event(at_s, rank, up))
        if not up:
            free.append(place.pop(node))
    return FaultTrace(name, rows[-1][0], tuple(Group(frozenset(), tuple(each)) for each in groups))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of one request, in tokens."""

    prompt: int
    output: int


class _Mooncake(msgspec.Struct):
    input_length: int
    output_length: int


def azure(folder: Path) -> list[Lengths]:
    with (folder / AZURE).open(newline="") as lines:
        return list(
            _usable((int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(lines))
        )


def mooncake(folder: Path) -> list[Lengths]:
    """Without its prefixes: every prompt is computed whole."""
    with (folder / MOONCAKE).open("rb") as lines:
        rows = (msgspec.json.decode(line, type=_Mooncake) for line in lines)
        return list(_usable((row.input_length, row.output_length) for row in rows))


PROMPT_MAX = 32_768  # longer ones are left out: not every layout that is compared has room for them


def _usable(rows: Iterable[tuple[int, int]]) -> Iterator[Lengths]:
    return (Lengths(prompt, output) for prompt, output in rows if 0 < prompt <= PROMPT_MAX and output > 0)
