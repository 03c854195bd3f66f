"""Requests whose output has a grammar, as their pipeline's last stage has them.

Where a request is in its grammar is a function of its token log, and all that is here a cache of it: whoever admits
the request again, after any change, follows the log from its beginning. What takes time is done elsewhere (`Follower`),
so a request may be here whose mask is not: its row is computed and not drawn, and its scheduler told to come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dataplane.model.sampler import Drawn, Foresight, SamplingTable

DEAD_END = "the grammar and bad_words allow none of the model's tokens here"
NONE_LEFT = "bad_words and min_tokens allow none of the model's tokens here"


@dataclass(slots=True, eq=False)
class Rule:
    """One request's place in its grammar. `masks[slot]` is what its next token may be, once it is `ready`."""

    masks: npt.NDArray[np.int32]
    slot: int
    ready: bool = False
    error: str = ""  # why it will have no next token
    asked: bool = False  # its scheduler waits to be told that it is settled
    closed: bool = False  # nobody needs it any more
    matcher: Any = None  # the follower's

    @property
    def settled(self) -> bool:
        return self.ready or bool(self.error)


class Follower(Protocol):
    """Compiles grammars and follows outputs through them, without holding up whoever calls."""

    def begin(self, rule: Rule, grammar: str, output: Sequence[int]) -> None:
        """Make a rule ready, or give it an error, some time later."""
        ...

    def advance(self, moves: Sequence[tuple[Rule, int]]) -> None:
        """The outputs of these rules grow by these tokens, in their order; masks follow before `settle` returns."""
        ...

    def foresee(self, drafts: Sequence[tuple[Rule, int, Sequence[int]]], foresight: Foresight) -> None:
        """The row of a draw at which a request's drafts begin, and these: fill in what may come behind each of them, in
        the rows that follow, before `settle` returns. The outputs do not grow. A rule that is not ready has nothing."""
        ...

    def settle(self) -> None:
        """Wait for the masks of all that has advanced or is foreseen. Any thread may."""
        ...


class Rules:
    """Those of one stage, by request. Without a follower every grammar is an error."""

    def __init__(self, follower: Follower | None) -> None:
        self._follower = follower
        self._rules: dict[int, Rule] = {}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def admit(self, rid: int, grammar: str, output: Sequence[int], table: SamplingTable, slot: int) -> None:
        """`output`: what the log has of it. The slot is the request's, admitted with its grammar."""
        assert table.masks is not None
        rule = self._rules[rid] = Rule(table.masks, slot)
        if self._follower is None:
            rule.error = "this node cannot follow grammars"
        else:
            self._follower.begin(rule, grammar, output)

    def forget(self, rid: int) -> None:
        rule = self._rules.pop(rid, None)
        if rule is not None:
            rule.closed = True

    def waiting(self, rids: Sequence[int]) -> tuple[int, ...]:
        """Which of the rows of a step, by index, cannot be drawn yet. To be asked before they are: a rule that becomes
        ready meanwhile had no mask. When it returns, the masks of all others are those of their logs."""
        rules = [self._rules.get(rid) for rid in rids]
        if self._follower is not None and any(rules):
            self._follower.settle()
        return tuple(row for row, rule in enumerate(rules) if rule is not None and not rule.settled)

    def foresee(self, rids: Sequence[int], depths: Sequence[int], drafts: Sequence[int]) -> Foresight | None:
        """The masks behind the drafts of a step, to be used after `waiting` has returned: `drafts[row]` is the one
        before what row `row` of `rids` draws, if `depths[row]`. None if no such request has a grammar."""
        wanted: list[tuple[Rule, int, list[int]]] = []
        for row, (rid, depth) in enumerate(zip(rids, depths, strict=True)):
            rule = self._rules.get(rid) if depth else None
            if rule is None:
                continue
            if depth == 1:
                wanted.append((rule, row - 1, []))
            wanted[-1][2].append(drafts[row])
        if not wanted or self._follower is None:
            return None
        words = wanted[0][0].masks.shape[1]
        foresight = Foresight(np.zeros((len(rids), words), np.int32), np.zeros(len(rids), np.uint8))
        self._follower.foresee(wanted, foresight)
        return foresight

    def judge(self, drawn: Drawn, rids: Sequence[int], waiting: tuple[int, ...]) -> Drawn:
        """A draw without the tokens of rows that wait or can have none."""
        failed = {}
        for row, rid in enumerate(rids):
            rule = self._rules.get(rid)
            if rule is None and row in drawn.dead_ends:
                failed[row] = NONE_LEFT
            if rule is None or row in waiting or row in drawn.poisoned:
                continue
            if row in drawn.dead_ends and not rule.error:
                rule.error = DEAD_END
            if rule.error:
                failed[row] = rule.error
        without = failed.keys() | set(waiting)
        if not without:
            return drawn
        tokens = drawn.tokens.copy()
        tokens[list(without)] = -1
        return replace(
            drawn,
            tokens=tokens,
            logprobs={row: value for row, value in drawn.logprobs.items() if row not in without},
            top={row: best for row, best in drawn.top.items() if row not in without},
            waiting=waiting,
            failed=tuple(failed.items()),
        )

    def advance(self, rids: Sequence[int], tokens: Sequence[int]) -> None:
        """Tokens have been drawn, below 0 where there is none, and are in their requests' logs."""
        moves = [
            (rule, token)
            for rid, token in zip(rids, tokens, strict=True)
            if token >= 0 and (rule := self._rules.get(rid)) is not None
        ]
        if moves and self._follower is not None:
            self._follower.advance(moves)

    def ask(self, rids: Sequence[int]) -> None:
        """Their scheduler waits for these: see `answers`."""
        for rid in rids:
            if (rule := self._rules.get(rid)) is not None:
                rule.asked = True

    def answers(self) -> list[int]:
        """Requests that their scheduler waits for and that are settled; each is named once."""
        found = [rid for rid, rule in self._rules.items() if rule.asked and rule.settled]
        for rid in found:
            self._rules[rid].asked = False
        return found
