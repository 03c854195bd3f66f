"""What a soak has found, in a file that a later one goes on from: 100,000 seeds take hours, and machines have less."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.sim.cluster import Outcome


@dataclass(slots=True)
class Record:
    """Of seeds `first_seed` up to `first_seed + wanted`, and of others, `pieces` [first, end) have run."""

    code: str
    first_seed: int
    wanted: int
    without: str | None
    pieces: list[tuple[int, int]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    seconds: float = 0.0
    virtual_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(end - first for first, end in self.pieces)

    def missing(self, chunk: int) -> list[tuple[int, int]]:
        """(first, count) of what has yet to run, in chunks of at most so many seeds."""
        gaps, at, limit = [], self.first_seed, self.first_seed + self.wanted
        for first, end in [*self.pieces, (limit, limit)]:
            until = min(first, limit)
            gaps += [(start, min(chunk, until - start)) for start in range(at, until, chunk)]
            at = max(at, end)
        return gaps

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Outcomes of seeds that follow one another."""
        seeds = []
        for outcome in outcomes:
            seeds.append(outcome.seed)
            self.faults += outcome.faults
            self.requests += outcome.requests
            self.virtual_s += outcome.virtual_s
            if outcome.failure:
                self.failed.append(outcome.seed)
        merged: list[tuple[int, int]] = []
        for first, end in sorted([*self.pieces, (seeds[0], seeds[-1] + 1)]):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((first, end))
        self.pieces = merged

    def line(self) -> str:
        return json.dumps({
            "code": self.code,
            "first_seed": self.first_seed,
            "wanted": self.wanted,
            "without": self.without,
            "count": self.count,
            "pieces": self.pieces,
            "failures": len(self.failed),
            "failed_seeds": sorted(self.failed),
            "seconds": round(self.seconds, 1),
            "seeds_per_s": round(self.count / self.seconds, 2) if self.seconds else 0.0,
            "virtual_hours": round(self.virtual_s / 3600, 2),
            "faults": dict(sorted(self.faults.items())),
            "requests": dict(sorted(self.requests.items())),
        })  # fmt: skip

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(self.line() + "\n")
        part.replace(path)


def resume(path: Path | None, fresh: Record) -> Record:
    """What `path` has of the same seeds of the same code; `fresh` if it has none. Raises ValueError for a file that is
    no record."""
    if path is None or not path.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        record = Record(
            found["code"],
            found["first_seed"],
            fresh.wanted,
            found["without"],
            [(first, end) for first, end in found["pieces"]],
            found["failed_seeds"],
            found["seconds"],
            found["virtual_hours"] * 3600,
            Counter(found["faults"]),
            Counter(found["requests"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the result of a soak ({error!r}): name another file") from error
    same = (record.code, record.first_seed, record.without) == (fresh.code, fresh.first_seed, fresh.without)
    return record if same else fresh
