"""Where a pipeline resumes: for each request, the least that any of its stages still holds. And how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataplane.core.prefix import unpack_names

GATHER_S = 0.03  # after the first answer of every stage


@dataclass(slots=True)
class HeldCollector:
    """Collects the answers to one `RejoinMeta`; complete once every stage has answered."""

    ask: int
    rids: tuple[int, ...]
    stages_missing: set[int]
    since: float
    adopts: bool = True  # false: only tells stages what to give back, nobody waits for the answers
    # Names that not all stages keep any more since it was asked.
    gone: set[bytes] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)  # stages that have not said anything yet
    _least: dict[int, int] = field(default_factory=dict)
    # By request: stages that have said nothing of it.
    _unheard: dict[int, set[int]] = field(default_factory=dict)
    _kept: list[list[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.silent = set(self.stages_missing)
        self._unheard = {rid: set(self.stages_missing) for rid in self.rids}

    def answer(
        self, stage: int, held: tuple[tuple[int, int], ...], kept: bytes = b"", more: bool = False
    ) -> list[int]:
        """Take one stage's answer; with `more` it is about the requests in `held` only, and there will be another.
        Returns the requests of which every stage has been heard now."""
        if stage not in self.stages_missing:
            return []
        self.silent.discard(stage)
        tokens = dict(held)
        heard = []
        for rid in [rid for rid in tokens if rid in self._unheard] if more else list(self._unheard):
            stages = self._unheard[rid]
            if stage not in stages:
                continue
            here = tokens.get(rid, 0)
            self._least[rid] = min(self._least.get(rid, here), here)
            stages.discard(stage)
            if not stages:
                del self._unheard[rid]
                heard.append(rid)
        if not more:
            self.stages_missing.discard(stage)
            self._kept.append(unpack_names(kept))
        return heard

    @property
    def complete(self) -> bool:
        """Whether every stage has said all."""
        return not self.stages_missing

    def resume_at(self, rid: int, total: int) -> int:
        """Position to go on from: at least the last known token must run again, since it yields the next."""
        return max(0, min(self._least.get(rid, 0), total - 1))

    def kept(self) -> tuple[list[bytes], set[bytes]]:
        """Blocks of no request: those of all stages, least recently used first, and those that only some have."""
        if not self._kept:
            return [], set()
        common = set(self._kept[0]).intersection(*self._kept[1:])
        common -= self.gone
        return [name for name in self._kept[0] if name in common], set().union(*self._kept) - common


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


@dataclass(slots=True)
class Recovery:
    """The one under way: what has been reached of it, and when."""

    epoch: int
    planned: bool
    seen: float
    connected: float = 0.0
    ready: float = 0.0  # a request could go on
    restored: float = 0.0
    requests: int = 0
    tokens_recomputed: int = 0

    def answered(self, now: float) -> None:
        """Every stage has answered; what it holds it may still be restoring."""
        self.connected = self.connected or now

    def heard(self, now: float) -> None:
        """Every stage has said what it holds of a request, or of all."""
        self.ready = self.ready or now

    def resumed(self, recomputed: int) -> None:
        self.requests += 1
        self.tokens_recomputed += recomputed

    def gathers(self, now: float) -> bool:
        """Whether the first step still waits for open questions. After a takeover gateways bring one request after the
        other; a step for the first one alone was one that all others waited for."""
        return not self.restored and now - (self.ready or now) < GATHER_S

    def issued(self, now: float) -> bool:
        """Rows go to the stages. False: nobody was interrupted, so there is nothing to tell."""
        if self.connected and not self.restored:
            self.restored = now
        return not self.restored or self.requests > 0

    def delivered(self, now: float) -> RecoveryTiming | None:
        """Tokens go to their readers; None: not yet the first after the recovery."""
        if not self.restored:
            return None
        return RecoveryTiming(
            self.epoch,
            self.seen,
            self.connected,
            self.restored,
            now,
            self.requests,
            self.tokens_recomputed,
            self.planned,
        )
