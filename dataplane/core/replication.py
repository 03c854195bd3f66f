"""Copying KV to one holder: what to send next, and how far behind the holder is.

A watermark is what the holder acknowledged, never more. Whole blocks are copied as they fill; what is in a part-filled
one is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from controlplane.contract.ids import Member
from dataplane.core.messages import KEPT

WINDOW_BLOCKS = 64  # sent and not acknowledged ...
WINDOW_BYTES = 64 << 20  # ... and no more bytes than that, but two blocks in any case
COPY_EVERY_S = 0.05  # blocks go in company: to wake a holder for each of them costs more than the copying
ANSWER_LIMIT_S = 2.0  # without an acknowledgement: ask again what the holder has
REFUSED_PAUSE_S = 0.5  # after a refusal, doubled with each further one: a holder says when it has room again
REFUSED_PAUSE_MAX_S = 60.0
RATE_OVER_S = 0.5  # acknowledged tokens are counted for so long to tell how fast copying goes
BEHIND_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Copy:
    """Send block `index` of a request; `tokens` are valid once it is stored."""

    rid: int
    index: int
    tokens: int


@dataclass(slots=True)
class _Progress:
    sent: int = 0
    acked: int = 0
    paused_until: float = 0.0
    refusals: int = 0  # in a row

    def refused(self, now: float) -> None:
        pause_s = REFUSED_PAUSE_S * 2.0 ** min(self.refusals, 30)
        self.paused_until = now + min(pause_s, REFUSED_PAUSE_MAX_S)
        self.refusals += 1


class ReplicaSource:
    """One (pipeline, holder) pair, as the serving node sees it. `tokens_of(rid)` is what KV is valid here, and
    `ready_of(rid)` what of it may be sent by now: the same, if it is not given."""

    def __init__(
        self,
        target: Member,
        block_size: int,
        tokens_of: Callable[[int], int],
        ready_of: Callable[[int], int] | None = None,
        block_bytes: int = 0,
    ) -> None:
        self.target = target
        self.block_size = block_size
        self.known = False  # the holder has said what it has
        self.refusals = 0  # ever
        # Names of blocks that were sent there, or that the holder has said it has.
        self.there: set[bytes] = set()
        # Names of blocks of no request that are to be sent, when nothing else is.
        self.kept: dict[bytes, None] = {}
        self.kept_waits = False  # some of them are on their way
        self._window = (
            max(2, min(WINDOW_BLOCKS, WINDOW_BYTES // block_bytes)) if block_bytes else WINDOW_BLOCKS
        )
        self._tokens_of = tokens_of
        self._ready_of = ready_of or tokens_of
        self._asked_at: float | None = None
        self._heard_at = 0.0
        self._next_at = 0.0  # when the next blocks may go
        self._progress: dict[int, _Progress] = {}
        self._dirty: dict[int, None] = {}  # requests with something to send, oldest first
        self._unacked: set[int] = set()
        self._counted = 0  # tokens acknowledged since `_counted_since`
        self._counted_since = -math.inf
        self._rate = 0.0  # tokens/s
        self._rewritten: dict[int, int] = {}  # from which position on, while a question was open
        self._dropped: set[int] = set()  # freed while a question was open: the answer may still name them
        # Freed, and not yet gone there for all we know: since when, oldest first.
        self._leaving: dict[int, float] = {}
        # The holder has copies of these, and so has this node, where they may still be taken up: nothing goes yet.
        self.waiting: set[int] = set()
        self._now = 0.0  # of the last `must_ask`, which comes with every turn

    def must_ask(self, now: float) -> bool:
        """Whether to send a query now: at first, and again when the holder owes an answer for too long."""
        self._now = now
        silent = bool(self._unacked) and now - self._heard_at > ANSWER_LIMIT_S
        left = next(iter(self._leaving.values()), now)
        if self.known and (silent or now - left > ANSWER_LIMIT_S):
            self.known = False
        if self.known or (self._asked_at is not None and now - self._asked_at < ANSWER_LIMIT_S):
            return False
        self._asked_at = now
        return True

    def restart(self) -> None:
        """The link or the fence changed: what was in flight may be lost."""
        self.known = False
        self._asked_at = None
        self.there.clear()
        self.kept.clear()
        self.kept_waits = False
        self._dropped.clear()
        self._leaving.clear()  # the answer names what is left
        self.waiting.clear()

    def wrote(self, rids: Iterable[int]) -> None:
        """The requests have KV here that the holder may lack."""
        self._dirty.update(dict.fromkeys(rids))

    def rewrote(self, rid: int, start: int) -> None:
        """Positions from `start` on were computed again, maybe after a stage of other numerics: what the holder has of
        them does not belong to what is here."""
        start -= start % self.block_size
        progress = self._progress.get(rid)
        if progress is not None and start < progress.sent:
            progress.sent, progress.acked = start, min(progress.acked, start)
            if progress.acked == progress.sent:
                self._unacked.discard(rid)
        if not self.known:  # the answer may still be of before
            self._rewritten[rid] = min(start, self._rewritten.get(rid, start))

    def freed(self, rids: Iterable[int]) -> None:
        """The holder is being told to drop them. That may be lost like all else: it says when they are gone."""
        for rid in rids:
            self._leaving.pop(rid, None)
            self._leaving[rid] = self._now
            self.waiting.discard(rid)
            if not self.known and self._asked_at is not None:
                self._dropped.add(rid)
            self._progress.pop(rid, None)
            self._rewritten.pop(rid, None)
            self._dirty.pop(rid, None)
            self._unacked.discard(rid)

    def take(self, now: float, limit: int | None = None) -> list[Copy]:
        """The next blocks to send, within the window and no more than `limit`."""
        if not self.known or not self._dirty or now < self._next_at:
            return []
        room = self._window - sum(self._blocks_unacked(rid) for rid in self._unacked)
        room = room if limit is None else min(room, limit)
        copies: list[Copy] = []
        for rid in list(self._dirty):
            goal = self._goal(rid)
            if goal == 0:  # nothing of it is here, or no longer: it must leave no trace
                del self._dirty[rid]
                continue
            progress = self._progress.setdefault(rid, _Progress())
            if now < progress.paused_until:
                continue
            ready = min(goal, self._ready_of(rid))
            while progress.sent < ready and len(copies) < room:
                if progress.refusals > 1 and rid in self._unacked:
                    break  # refused time and again: one block tells whether there is room now
                index = progress.sent // self.block_size
                progress.sent = min((index + 1) * self.block_size, ready)
                copies.append(Copy(rid, index, progress.sent))
                self._leaving.pop(rid, None)  # it is back, and takes the place of what was there
                self._unacked.add(rid)
            if progress.sent >= goal:
                del self._dirty[rid]
            if len(copies) >= room:
                break
        else:
            self._next_at = now + COPY_EVERY_S
        if copies and len(copies) == sum(self._blocks_unacked(rid) for rid in self._unacked):
            self._heard_at = now  # nothing was outstanding: the wait for an answer begins
        return copies

    def acknowledged(
        self, held: Iterable[tuple[int, int]], whole: bool, refused: bool, now: float
    ) -> list[int]:
        """Take the holder's watermarks. Returns requests that it holds and that are not served here: to be `freed`."""
        self._heard_at = now
        unknown: list[int] = []
        if whole:
            held = [item for item in held if item[0] not in self._dropped]
            self._leaving = {rid: since for rid, since in self._leaving.items() if rid in self._dropped}
            self._dropped.clear()
            self.waiting.clear()
            self.known = True
            self._progress.clear()
            self._unacked.clear()
        for rid, tokens in held:
            if rid == KEPT:
                self.kept_waits = False
                continue
            valid = self._tokens_of(rid)
            if tokens == 0:
                self._leaving.pop(rid, None)
            if valid == 0:
                if tokens > 0 and rid not in self._leaving:
                    unknown.append(rid)
                continue
            if whole:
                tokens = min(tokens, self._rewritten.pop(rid, tokens))
            progress = self._progress.setdefault(rid, _Progress())
            if not whole and tokens > progress.sent:
                continue  # of an earlier life of the request, whose copies the holder has been told to drop
            acked, progress.acked = progress.acked, min(tokens, valid)
            if not whole:
                self._counted += max(0, progress.acked - acked)
            if progress.acked > acked:
                progress.refusals = 0
            if whole or refused:
                progress.sent = progress.acked
                self._dirty[rid] = None
            if refused:
                self.refusals += 1
                progress.refused(now)
            if progress.acked >= progress.sent:
                self._unacked.discard(rid)
        if whole:
            self._rewritten.clear()
        if now - self._counted_since >= RATE_OVER_S:
            self._rate = self._counted / (now - self._counted_since)
            self._counted, self._counted_since = 0, now
        return unknown

    def unclaimed(self, copies: Collection[int]) -> tuple[int, ...]:
        """Of what waited to be taken up: what is not among the `copies` here any more, and not served. To be `freed`.

        Its scheduler has named all that is alive, or its copy here made room."""
        over = [rid for rid in self.waiting if rid not in copies]
        self.waiting.difference_update(over)
        return tuple(rid for rid in over if self._tokens_of(rid) == 0)

    def room(self) -> None:
        """The holder, which had refused something, has room again: nothing waits any longer."""
        for progress in self._progress.values():
            progress.paused_until, progress.refusals = 0.0, 0
        self._next_at = 0.0

    def has(self, rid: int) -> bool:
        """Whether anything of the request has been sent there, or is there."""
        return rid in self._progress

    def acked(self, rid: int) -> int:
        """How many positions of it the holder has acknowledged."""
        progress = self._progress.get(rid)
        return 0 if progress is None else progress.acked

    def lag_tokens(self, rids: Iterable[int]) -> int:
        """Tokens that are valid here in whole blocks and not acknowledged there."""
        lag = 0
        for rid in rids:
            progress = self._progress.get(rid)
            lag += max(0, self._goal(rid) - (progress.acked if progress else 0))
        return lag

    def behind_s(self, lag_tokens: int) -> float:
        """Seconds that copying so much takes at the rate seen last, which is the link's once it is busy."""
        if lag_tokens == 0:
            return 0.0
        return min(lag_tokens / self._rate, BEHIND_MAX_S) if self._rate > 0 else BEHIND_MAX_S

    def _goal(self, rid: int) -> int:
        tokens = self._tokens_of(rid)
        return tokens - tokens % self.block_size

    def _blocks_unacked(self, rid: int) -> int:
        progress = self._progress[rid]
        return -(-progress.sent // self.block_size) - progress.acked // self.block_size
