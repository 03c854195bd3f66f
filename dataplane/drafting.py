"""Drafts from a small model: a whole one on the node of the first stage, beside what that node serves.

It draws as the last stage does, with the request's own seed and options: where the two models mean the same, so do
their draws, at any temperature. What it has in its own KV pool is a cache of the log, never copied, and made again at
need.

Its passes run on the event loop between two steps, when nobody else computes for these requests, so they have to be
over soon: `PASSES_S`. A prompt is taken in piece by piece, and there are no drafts before all of it is in."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from controlplane.contract.requests import Sampling
from dataplane._fast.blocktable import BlockTable
from dataplane.core.request import Request
from dataplane.model.errors import ModelError
from dataplane.model.sampler import SamplingTable

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor

log = logging.getLogger(__name__)

PASSES_S = 0.01  # that all passes between two steps take together, about
PIECE_MIN = 16  # tokens of a prompt, however slow the model is
POOL_BYTES_MAX = 256 << 20  # of its KV
MEASURED = 0.2  # of a new measurement in what a token of a prompt takes
PASSES_KEPT = 15  # measurements
# What a pass took when the machine was busy is forgotten after about so long without one: nothing else would tell that
# it no longer is.
BUSY_S = 1.0


@dataclass(slots=True)
class _Known:
    """What the pool has of a request."""

    row: int
    slot: int  # of the sampler
    ids: list[int] = field(default_factory=list)  # whose KV is there
    sure: int = 0  # of these, the first ones that are in the log; drafts follow


class DraftModel:
    """Not thread-safe. `executor`: all of the draft model in one stage, with its own pool."""

    def __init__(self, executor: StageExecutor, requests_max: int) -> None:
        size, blocks = executor.kv.block_size, executor.kv.num_blocks
        self._executor = executor
        self._context = min(executor.config.max_positions, blocks * size)
        self._table = BlockTable(requests_max, -(-self._context // size), size)
        self._free = list(range(blocks))
        self._known: dict[int, _Known] = {}  # least recently used first
        # One more than requests: a slot is given back when the next one is there.
        self._sampling = SamplingTable(requests_max + 1, executor.config.vocab_size, executor.team)
        self._requests_max = requests_max
        # What a draft for so many requests took, in seconds.
        self._passes: deque[tuple[int, float]] = deque(maxlen=PASSES_KEPT)
        self._passed_at = 0.0
        self._token_s = 0.0
        self._broken = False
        self._pieces = 0  # of logs that were taken in, in this call

    def pass_s(self, requests: int) -> float:
        """See `core.speculation.Proposer`. More requests than were measured take as many times more, at most."""
        if self._broken:
            return math.inf
        if not self._passes:
            return 0.0
        passes = [took * max(1.0, requests / count) for count, took in self._passes]
        least, usual = min(passes), median(passes)
        idle_s = time.monotonic() - self._passed_at
        return least + (usual - least) * math.exp2(-idle_s / BUSY_S)

    def warm_up(self) -> None:
        """Measure what a pass takes. To be called before anybody is served."""
        row, slot = self._table.new_row(), self._sampling.admit(Sampling(2, 0), [])
        tokens = min(64, self._context - 8)
        for count in (tokens, 1, 1, 1, 1, 1):
            start = self._table.valid(row)
            began = time.monotonic()
            logits = self._forward([row], [[0] * count], start_of=[start])
            if count == 1:
                self._sampling.sample(logits, np.array([slot], np.int32))
                self._passed(1, began)
        self._sampling.release(slot)
        self._free += self._table.free_row(row)

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        """See `core.speculation.Proposer`. After an error of ours there are no drafts any more: requests do without."""
        try:
            if not self._broken:
                return self._proposed(requests, count, within_s)
        except Exception:
            log.exception("the draft model failed: there are no drafts on this node until it is started anew")
            self._broken = True
        return [[] for _ in requests]

    def _proposed(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        began = time.monotonic()
        deadline, caught_up_by = began + PASSES_S, began + min(PASSES_S, within_s)
        ready: list[Request] = []
        self._pieces = 0
        for request in requests[: self._requests_max]:
            if self._catch_up(request, count, caught_up_by):
                ready.append(request)
        ready = [request for request in ready if request.rid in self._known]  # others may have made room
        drafts: dict[int, list[int]] = {request.rid: [] for request in ready}
        for _ in range(count):
            if not ready or (drafts[ready[0].rid] and time.monotonic() + self.pass_s(len(ready)) > deadline):
                break
            self._deepen(ready, drafts)
        return [drafts.get(request.rid, []) for request in requests]

    def forget(self, rid: int) -> None:
        known = self._known.pop(rid, None)
        if known is not None:
            self._sampling.release(known.slot)
            self._free += self._table.free_row(known.row)

    # ------------------------------------------------------------------

    def _catch_up(self, request: Request, count: int, deadline: float) -> bool:
        """See that all of the request's log but its last token is here, with room for drafts behind it."""
        if request.total + count > self._context:
            return False
        known = self._known.pop(request.rid, None)
        if known is None:
            if len(self._known) == self._requests_max:
                self._evict()
            known = _Known(self._table.new_row(), self._sampling.admit(draft_sampling(request.sampling), []))
        self._known[request.rid] = known
        end = request.total - 1
        same = min(known.sure, end)
        while same < min(len(known.ids), end) and known.ids[same] == request.ids[same]:
            same += 1
        del known.ids[same:]  # drafts that were wrong
        while len(known.ids) < end:
            left_s = deadline - time.monotonic()
            if left_s <= 0 and self._pieces:  # one at least, or it would never end
                return False
            self._pieces += 1
            start = len(known.ids)
            piece = max(PIECE_MIN, int(left_s / self._token_s)) if self._token_s else PIECE_MIN
            tokens = request.ids[start : min(start + piece, end)]
            if not self._room(request.rid, start + len(tokens)):
                return False
            self._forward([known.row], [tokens], start_of=[start])
            known.ids += tokens
        known.sure = end
        return self._room(request.rid, request.total + count)

    def _deepen(self, requests: Sequence[Request], drafts: dict[int, list[int]]) -> None:
        """One more draft for each."""
        began = time.monotonic()
        rows, tokens, starts = [], [], []
        for request in requests:
            known, more = self._known[request.rid], drafts[request.rid]
            token = more[-1] if more else request.ids[-1]
            rows.append(known.row)
            tokens.append([token])
            starts.append(len(known.ids))
            known.ids.append(token)
        logits = self._forward(rows, tokens, start_of=starts)
        slots = [self._slot(request, drafts[request.rid]) for request in requests]
        drawn = self._sampling.sample(logits, np.array(slots, np.int32)).tokens
        for request, token in zip(requests, drawn.tolist(), strict=True):
            # Of numbers that are not finite: as good a draft as any.
            drafts[request.rid].append(max(0, token))
        self._passed(len(requests), began)

    def _passed(self, requests: int, began: float) -> None:
        self._passed_at = time.monotonic()
        self._passes.append((requests, self._passed_at - began))

    def _slot(self, request: Request, drafts: list[int]) -> int:
        """The sampler's, as the request is behind these drafts."""
        known = self._known[request.rid]
        if penalised(request.sampling):  # each token counts
            prompt, output = request.ids[: request.prompt_len], request.ids[request.prompt_len :] + drafts
            old, known.slot = (
                known.slot,
                self._sampling.admit(draft_sampling(request.sampling), prompt, output),
            )
            self._sampling.release(old)
        else:
            self._sampling.seek(known.slot, request.total - request.prompt_len + len(drafts))
        return known.slot

    def _forward(
        self, rows: list[int], tokens: list[list[int]], *, start_of: list[int]
    ) -> npt.NDArray[np.float32]:
        """Logits [R, vocab] behind the last tokens of each row."""
        began = time.monotonic()
        counts = np.array([len(some) for some in tokens], np.int32)
        at = np.array(rows, np.int32), np.array(start_of, np.int32), counts
        missing = self._table.grow(*at, self._free)
        assert not missing, "room was made before"
        arrays = self._table.fill(*at)
        flat = np.array([token for some in tokens for token in some], np.int64)
        logits = self._executor.forward(flat, None, arrays, (np.cumsum(counts) - 1).astype(np.int32))
        self._table.commit(*at)
        took = time.monotonic() - began
        if len(flat) > len(rows):
            token_s = took / len(flat)
            self._token_s += (token_s - self._token_s) * (MEASURED if self._token_s else 1.0)
        return logits.astype(np.float32, copy=False)

    def _room(self, rid: int, tokens: int) -> bool:
        """See that the request can have so many positions. Others, the least recently used first, make room."""
        size = self._executor.kv.block_size
        need = -(-tokens // size) - self._table.num_blocks(self._known[rid].row)
        # What this very call drafts for has just been used: it is at the end.
        while need > len(self._free) and len(self._known) > 1:
            self._evict()
        return need <= len(self._free)

    def _evict(self) -> None:
        self.forget(next(iter(self._known)))


def penalised(sampling: Sampling) -> bool:
    """Whether a draw depends on which tokens came before, beside their number."""
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


def draft_sampling(sampling: Sampling) -> Sampling:
    """What a draft is drawn with. What it leaves out costs drafts that are wrong, and no token."""
    return msgspec.structs.replace(sampling, logprobs=None, grammar="", bad_words=())


def load_draft_model(
    folder: Path, vocab_size: int, block_size: int, requests_max: int, context: int, threads: int
) -> DraftModel:
    """Raises ModelError for a checkpoint that cannot be read, or whose tokens are not the model's."""
    from dataplane.executor import StageExecutor
    from dataplane.model.config import load_config

    c = load_config(folder)
    if c.vocab_size != vocab_size:
        raise ModelError(
            folder / "config.json", "vocab_size", f"{c.vocab_size} tokens, and the model has {vocab_size}"
        )
    block_bytes = 2 * 4 * c.num_layers * c.num_kv_heads * c.head_dim * block_size  # float32 at most
    wanted = requests_max * -(-min(context, c.max_positions) // block_size)
    blocks = max(8, min(wanted, POOL_BYTES_MAX // block_bytes))
    model = DraftModel(
        StageExecutor(folder, 0, 1, num_blocks=blocks, block_size=block_size, threads=threads), requests_max
    )
    model.warm_up()
    return model
