"""One stage of one pipeline on one node: which steps it takes, what KV it holds, what it must know to sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from controlplane.contract.ids import PipelineId
from dataplane._fast.blocktable import BlockTable, KvGap, Rows, StepArrays, lookup
from dataplane.core.blocks import KvStore
from dataplane.core.messages import Admit, Fence, HeldMeta, PromptScores, RejoinMeta, StepMeta
from dataplane.core.prefix import unpack_names
from dataplane.core.rules import Follower, Rules
from dataplane.core.scores import ScoreRows, Scores, cut
from dataplane.model.sampler import Drawn, Foresight, SamplingTable


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step whose blocks are there."""

    meta: StepMeta
    rows: Rows
    table_rows: npt.NDArray[np.int32]  # [B] of the block table
    slots: npt.NDArray[np.int32]  # [K] of the sampling table; last stage only
    names: list[bytes]  # of the blocks that the rows fill
    # [K] the draft before what is sampled (0 where there is none), for the last stage of a step with drafts.
    drafts: npt.NDArray[np.int32] | None = None
    foresight: Foresight | None = None  # what grammars allow behind them
    # Tokens of prompts whose log probabilities are asked for; last stage only.
    scored: ScoreRows | None = None

    @property
    def logit_rows(self) -> npt.NDArray[np.int32]:
        """Of which of its tokens the last stage makes logits: those that sample, then those that are scored."""
        if self.scored is None:
            return self.rows.sample_rows
        return np.concatenate([self.rows.sample_rows, self.scored.rows])

    @property
    def unfinished(self) -> bool:
        """Whether a prompt goes on in the next step."""
        return bool(np.count_nonzero(self.rows.depths == 0) < len(self.rows.rids))


@dataclass(frozen=True, slots=True)
class Part:
    """Which of a batch's T tokens, and of its K rows of logits, are one step's."""

    tokens: slice
    samples: slice
    scores: slice


@dataclass(frozen=True, slots=True)
class Batch:
    """Steps of several pipelines as one. Its arrays hold until the next batch is joined."""

    arrays: StepArrays
    logit_rows: npt.NDArray[np.int32]  # [K] indices into the batch's tokens
    parts: tuple[Part, ...]  # by step


def join(steps: Sequence[Prepared], table: BlockTable) -> Batch:
    """The rows of all steps behind one another. The steps are of different pipelines, one stage index, one table."""
    rows = [step.rows for step in steps]
    if len(rows) == 1:  # nearly always, and nothing is to be copied
        arrays = table.fill(steps[0].table_rows, rows[0].starts, rows[0].counts)
        sampled, picked = len(rows[0].sample_rows), steps[0].logit_rows
        part = Part(slice(0, arrays.num_tokens), slice(0, sampled), slice(sampled, len(picked)))
        return Batch(arrays, picked, (part,))
    arrays = table.fill(
        np.concatenate([step.table_rows for step in steps]),
        np.concatenate([some.starts for some in rows]),
        np.concatenate([some.counts for some in rows]),
    )
    parts: list[Part] = []
    logit_rows = []
    tokens = logits = 0
    for step in steps:
        count, picked = int(step.rows.counts.sum()), step.logit_rows
        logit_rows.append(picked + np.int32(tokens))
        sampled = logits + len(step.rows.sample_rows)
        parts.append(
            Part(slice(tokens, tokens + count), slice(logits, sampled), slice(sampled, logits + len(picked)))
        )
        tokens, logits = parts[-1].tokens.stop, parts[-1].scores.stop
    return Batch(arrays, np.concatenate(logit_rows), tuple(parts))


def drafts_of(meta: StepMeta, rows: Rows) -> npt.NDArray[np.int32] | None:
    """The draft [K] before what a step samples, 0 where there is none; None if it has no drafts. Raises ValueError if
    they are not as many as its rows have."""
    drafts, behind = np.frombuffer(meta.drafts, "<i4"), rows.depths > 0
    if len(drafts) != np.count_nonzero(behind):
        raise ValueError(f"step {meta.step} has {len(drafts)} drafts, its rows {np.count_nonzero(behind)}")
    if not len(drafts):
        return None
    found = np.zeros(len(behind), np.int32)
    found[behind] = drafts
    return found


class Stage:
    """`sampling`: the table to keep requests' token logs in, for the last stage; `follower`: of their grammars."""

    def __init__(
        self,
        pipeline: PipelineId,
        index: int,
        num_stages: int,
        epoch: int,
        store: KvStore,
        sampling: SamplingTable | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.index = index
        self.is_last = index == num_stages - 1
        self.fence = Fence(epoch, 0)
        self.last_step = -1  # executed in this fence
        self.store = store
        self.sampling = sampling
        self.rules = Rules(follower)
        self._scores = Scores()
        self._slots: dict[int, int] = {}  # of the sampling table, by request

    def enter(self, fence: Fence) -> None:
        """What was in flight before `fence` is void, and so is what was known of requests' logs."""
        self.fence = fence
        self.last_step = -1
        for rid in list(self._slots):
            self._forget(rid)

    def stale(self, fence: Fence) -> bool:
        return fence < self.fence

    def prepare(self, meta: StepMeta) -> Prepared | str:
        """Free, admit, and find blocks for a step. A string says why it cannot run: "space" or "gap"."""
        if meta.fence > self.fence:  # it came before the question that begins its round
            self.enter(meta.fence)
        for rid in meta.drops:
            self.store.drop((self.pipeline, rid))
            self._forget(rid)
        for rid in meta.frees:
            self.store.release((self.pipeline, rid))
            self._forget(rid)
        for begin in meta.begins:
            if not self.store.resume(self.pipeline, begin.rid, unpack_names(begin.names), begin.tail):
                return "space" if self.store.missing else "gap"
        self.store.evict(self.pipeline, unpack_names(meta.evicts))
        for admit in meta.admits:
            self._admit(admit)
        rows = Rows(meta.rows)
        drafts = drafts_of(meta, rows)
        try:
            table_rows = self.store.begin(self.pipeline, rows)
        except KvGap:
            return "gap"
        if table_rows is None:
            return "space"
        names = unpack_names(meta.seals)
        if names and len(names) != (filled := self.store.fills(table_rows, rows)):
            raise ValueError(f"{len(names)} names for {filled} blocks that step {meta.step} fills")
        slots, unknown = lookup(self._slots, rows.sample_rids)
        if self.is_last and unknown:
            return "gap"
        scored = self._scores.of_step(rows)
        if not self.is_last or drafts is None:
            return Prepared(meta, rows, table_rows, slots, names, scored=scored)
        foresight = None
        if self.rules:
            foresight = self.rules.foresee(rows.sample_rids.tolist(), rows.depths.tolist(), drafts.tolist())
        return Prepared(meta, rows, table_rows, slots, names, drafts, foresight, scored)

    def draw(self, step: Prepared, logits: npt.NDArray[np.float32]) -> Drawn:
        """The next tokens [K] of a step's rows, of their logits [K, vocab]; for a last stage. Changes nothing.

        Behind a draft that is not what was drawn before it there is none."""
        assert self.sampling is not None
        depths = None if step.drafts is None else step.rows.depths
        if not self.rules:
            drawn = self.sampling.sample(logits, step.slots, depths, step.drafts)
            if not drawn.dead_ends:
                return drawn
            return self.rules.judge(drawn, step.rows.sample_rids.tolist(), ())
        rids = step.rows.sample_rids.tolist()
        waiting = self.rules.waiting(rids)
        drawn = self.sampling.sample(logits, step.slots, depths, step.drafts, step.foresight)
        return self.rules.judge(drawn, rids, waiting)

    def score(
        self, scored: ScoreRows, logits: npt.NDArray[np.float32]
    ) -> tuple[tuple[PromptScores, ...], tuple[int, ...]]:
        """Log probabilities of tokens of prompts, of their logits [S, vocab]; and the requests whose logits are not
        finite. For a last stage. Changes nothing."""
        assert self.sampling is not None
        found = self.sampling.score(logits, scored.tokens, scored.top)
        records, poisoned, at = [], [], 0
        for part in scored.parts:
            rows = slice(at, at + part.count)
            records.append(found.records(rows, part.top))
            if not found.finite[rows].all():
                poisoned.append(part.rid)
            at += part.count
        return cut(scored, records), tuple(poisoned)

    def commit(self, step: Prepared, tokens: npt.NDArray[np.int64] | None) -> list[int]:
        """The step has run: the KV of its rows is valid, and `tokens` [K] were drawn (last stage), below 0 where there
        is none.

        Returns the requests that have filled a block with it."""
        self.last_step = step.meta.step
        if tokens is not None and self.sampling is not None:
            if self.rules or step.drafts is not None or (tokens < 0).any():
                self.rules.advance(step.rows.sample_rids.tolist(), tokens.tolist())
                drawn = tokens >= 0
                self.sampling.append_many(step.slots[drawn], tokens[drawn])
            else:
                self.sampling.append_many(step.slots, tokens)
        filled = self.store.commit(step.table_rows, step.rows, step.names)
        return [int(step.rows.rids[index]) for index in filled]

    def rejoin(self, meta: RejoinMeta) -> HeldMeta:
        """Enter the message's fence, take up what there is of each request, and say how much that is."""
        if meta.fence > self.fence:
            self.enter(meta.fence)
        held = []
        for index, rid in enumerate(meta.rids):
            names = unpack_names(meta.names[index]) if meta.names else ()
            if meta.adopts:
                tokens = self.store.take_up(self.pipeline, rid, names)
            else:
                tokens = self.store.tokens((self.pipeline, rid))
            if tokens:
                held.append((rid, tokens))
        if meta.complete:
            self.store.settle(self.pipeline, meta.rids)
        kept = self.store.keeps(self.pipeline) if meta.kept else ()
        return HeldMeta(self.pipeline, meta.fence, meta.ask, self.index, tuple(held), b"".join(kept))

    def _admit(self, admit: Admit) -> None:
        if self.sampling is not None:
            self._forget(admit.rid)
            prompt, output = (np.frombuffer(data, "<i4") for data in (admit.prompt, admit.output))
            slot = self._slots[admit.rid] = self.sampling.admit(admit.sampling, prompt, output)
            if admit.sampling.grammar:
                self.rules.admit(admit.rid, admit.sampling.grammar, output.tolist(), self.sampling, slot)
            if admit.scored >= 0 and admit.sampling.prompt_logprobs is not None:
                self._scores.admit(admit.rid, prompt, admit.scored, admit.sampling.prompt_logprobs)

    def _forget(self, rid: int) -> None:
        self.rules.forget(rid)
        self._scores.forget(rid)
        slot = self._slots.pop(rid, None)
        if slot is not None and self.sampling is not None:
            self.sampling.release(slot)
