"""Prompts whose log probabilities are asked for, as their pipeline's last stage has them.

A prompt's token is scored by the logits of the position before it. Where a request is with that says its scheduler when
it admits it, so nothing here has to outlive a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import Rows
from dataplane.core.messages import PromptScores


@dataclass(frozen=True, slots=True)
class _Scored:
    prompt: npt.NDArray[np.int32]
    scored: int  # tokens, without the first one, that its scheduler had at admission
    top: int  # of the most likely tokens, so many are asked for


@dataclass(frozen=True, slots=True)
class ScorePart:
    """One request's tokens among those that a step scores."""

    rid: int
    first: int  # position of the first of them
    count: int
    top: int


@dataclass(frozen=True, slots=True)
class ScoreRows:
    """What a step scores: the logits of its tokens `rows` int32 [S] (indices into the step's) are those of `tokens`
    int32 [S]."""

    rows: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    parts: tuple[ScorePart, ...]

    @property
    def top(self) -> int:
        """The most that one of them asks for."""
        return max(part.top for part in self.parts)


class Scores:
    """Those of one stage, by request."""

    def __init__(self) -> None:
        self._prompts: dict[int, _Scored] = {}

    def admit(self, rid: int, prompt: npt.NDArray[np.int32], scored: int, top: int) -> None:
        self._prompts[rid] = _Scored(prompt, scored, top)

    def forget(self, rid: int) -> None:
        self._prompts.pop(rid, None)

    def of_step(self, rows: Rows) -> ScoreRows | None:
        """What of a step has to be scored; None: nothing."""
        if not self._prompts:
            return None
        at = 0
        picked, tokens, parts = [], [], []
        for rid, start, count in zip(
            rows.rids.tolist(), rows.starts.tolist(), rows.counts.tolist(), strict=True
        ):
            known = self._prompts.get(rid)
            if known is not None:
                first, end = max(start, known.scored), min(start + count, len(known.prompt) - 1)
                if first < end:
                    picked.append(np.arange(at + first - start, at + end - start, dtype=np.int32))
                    tokens.append(known.prompt[first + 1 : end + 1])
                    parts.append(ScorePart(rid, first + 1, end - first, known.top))
            at += count
        if not parts:
            return None
        return ScoreRows(np.concatenate(picked), np.concatenate(tokens), tuple(parts))


def cut(scored: ScoreRows, records: Sequence[bytes]) -> tuple[PromptScores, ...]:
    """What the scheduler is told. `records`: those of each part."""
    return tuple(
        PromptScores(part.rid, part.first, data) for part, data in zip(scored.parts, records, strict=True)
    )
