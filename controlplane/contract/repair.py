"""What it costs to bring KV back: one model for the stage that chooses how, and for who foretells it.

All of it is measured live. Zeros: not measured yet, and nothing is said that rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

import msgspec


def middle(measured: Iterable[tuple[float, float]]) -> float:
    """The median of (value, weight); 0 of none. Other work on the same cores makes single measurements late."""
    found = sorted(measured)
    half = sum(weight for _, weight in found) / 2
    sums = accumulate(weight for _, weight in found)
    return next((value for (value, _), below in zip(found, sums, strict=True) if below >= half), 0.0)


# Of the time that restoring is said to take, what computing again may take to be preferred. Both are rough on busy
# cores, a wrong choice costs a long request seconds, and restoring leaves the stages free for other requests.
PREFERRED_SHARE = 0.5


class Computing(msgspec.Struct, frozen=True, array_like=True):
    """How fast a pipeline computes again what was lost, as its scheduler sees it."""

    step_s: float = 0.0  # a step without prompts, through all stages
    token_s: float = 0.0  # what a position of a prompt adds to a step
    pace_s: float = 0.0  # for each position, where several steps are in the stages at a time; 0: as `token_s`
    chunk_tokens: int = 0  # of one step; 0: any

    def wait_s(self, tokens: int) -> float | None:
        """Until the last of so many positions is computed and the token behind it is there."""
        if not self.step_s or (tokens and not self.token_s):
            return None
        alone = min(tokens, self.chunk_tokens or tokens)
        return self.step_s + alone * self.token_s + (tokens - alone) * (self.pace_s or self.token_s)


class Restoring(msgspec.Struct, frozen=True, array_like=True):
    """How fast nodes that lack blocks have them restored from parity."""

    wait_s: float = 0.0  # for the first ones
    block_s: float = 0.0  # for each one behind them
    blocks: int = 0  # of which that is known

    def needs_s(self, blocks: int) -> float | None:
        """Until so many blocks are there."""
        if not blocks:
            return 0.0
        return self.wait_s + blocks * self.block_s if self.block_s else None


def computed_again(
    lacking: Mapping[int, int], block_size: int, computing: Computing, restoring: Restoring
) -> set[int]:
    """Which requests are computed again while the blocks of the others are restored, both at once. `lacking`: by
    request, blocks that could be restored.

    The shortest first, and only as long as each is there in half the time that it would take to restore it behind all
    others."""
    chosen: set[int] = set()
    blocks_left, again = sum(lacking.values()), 0
    for rid, blocks in sorted(lacking.items(), key=lambda each: (each[1], each[0])):
        if not blocks:
            continue
        again += blocks * block_size
        restored_s, computed_s = restoring.needs_s(blocks_left), computing.wait_s(again)
        if restored_s is None or computed_s is None:
            break
        if computed_s - computing.step_s >= PREFERRED_SHARE * restored_s:
            break
        chosen.add(rid)
        blocks_left -= blocks
    return chosen


def repair_s(tokens: int, blocks: int, computing: Computing, restoring: Restoring) -> float | None:
    """From when all stages know of each other until the slowest stream has its next token: so many blocks are
    restored, then so many positions computed. None: not measured."""
    restored_s, computed_s = restoring.needs_s(blocks), computing.wait_s(tokens)
    return None if restored_s is None or computed_s is None else restored_s + computed_s
