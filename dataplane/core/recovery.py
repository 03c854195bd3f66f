"""Where a pipeline resumes: for each request, the least that any of its stages still holds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class HeldCollector:
    """Collects the answers to one `RejoinMeta`; complete once every stage has answered."""

    ask: int
    rids: tuple[int, ...]
    stages_missing: set[int]
    since: float
    adopts: bool = True  # false: only tells stages what to give back, nobody waits for the answers
    _least: dict[int, int] = field(default_factory=dict)

    def answer(self, stage: int, held: tuple[tuple[int, int], ...]) -> bool:
        """Take one stage's answer. Returns whether it was the last one missing."""
        if stage not in self.stages_missing:
            return False
        self.stages_missing.discard(stage)
        tokens = dict(held)
        for rid in self.rids:
            self._least[rid] = min(self._least.get(rid, tokens.get(rid, 0)), tokens.get(rid, 0))
        return not self.stages_missing

    def resume_at(self, rid: int, total: int) -> int:
        """Position to go on from: at least the last known token must run again, since it yields the next."""
        return max(0, min(self._least.get(rid, 0), total - 1))


@dataclass(frozen=True, slots=True)
class RecoveryTiming:
    """One recovery, by the scheduler's monotonic clock (seconds)."""

    epoch: int
    seen: float
    connected: float
    restored: float
    first_token: float
    requests: int
    tokens_recomputed: int
    planned: bool
