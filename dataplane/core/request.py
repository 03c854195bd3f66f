"""A request as its scheduler keeps it: the token log, and how far its KV has come."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from controlplane.contract.requests import FinishReason, Sampling, Submit, Token
from dataplane.core.messages import Admit


class Phase(Enum):
    WAITING = "waiting"  # queued; holds no KV that counts
    RECOVERING = "recovering"  # the stages are being asked what KV they hold of it
    RUNNING = "running"


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as int32, little endian."""
    return struct.pack(f"<{len(tokens)}i", *tokens)


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of `pack_tokens`. Raises struct.error when cut short."""
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def fault_of(message: Submit, vocab_size: int) -> str | None:
    """What in a request would break the step that runs it, and so every node that it is tried on; None if nothing.

    Gateways check what clients send; this is for a tokenizer or a setting that does not fit the model.
    """
    sampling = message.sampling
    ids = [*message.prompt, *message.emitted, *(token for token, _ in sampling.logit_bias)]
    if sampling.min_tokens > 0:
        ids.extend(sampling.stop_token_ids)
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        return f"token id {wrong} is outside the model's vocabulary of {vocab_size}"
    if not 0.0 <= sampling.min_p <= 1.0:
        return f"min_p {sampling.min_p} is not in [0, 1]"
    return None


@dataclass(slots=True)
class Request:
    """Positions count prompt and output together. computed <= issued <= total.

    `issued` runs ahead of `computed` by what is in flight: several chunks of one prompt may be on their way
    through the pipeline, since each stage handles steps in order.
    """

    rid: int
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int
    order: int  # of arrival
    session: int | None  # the gateway stream that listens; None while there is none
    output: list[Token] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    computed: int = 0
    issued: int = 0
    attempt: int = 0  # preemptions and recoveries: results of an older attempt are not for this one
    announced: bool = False  # the last stage knows the token log, in the present fence
    blocks: int = 0  # KV blocks reserved on every stage
    orphaned_at: float | None = None

    @classmethod
    def from_submit(cls, message: Submit, order: int, session: int) -> Request:
        output = [Token(message.rid, i, token) for i, token in enumerate(message.emitted)]
        return cls(message.rid, message.prompt, message.sampling, message.priority, order, session, output)

    @property
    def total(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, count: int) -> list[int]:
        """The ids at positions [start, start + count)."""
        split = len(self.prompt)
        ids = list(self.prompt[start : start + count])
        first, last = max(start - split, 0), start + count - split
        if last > 0:
            ids.extend(item.token for item in self.output[first:last])
        return ids

    def admit(self) -> Admit:
        return Admit(
            self.rid, self.sampling, pack_tokens(self.prompt), pack_tokens([t.token for t in self.output])
        )

    def rewind(self, phase: Phase, computed: int = 0) -> None:
        """Forget what is in flight and start again from `computed`."""
        self.phase = phase
        self.computed = self.issued = computed
        self.attempt += 1
        self.announced = False

    def finish_of(self, token: int, context_len: int) -> FinishReason | None:
        """Why `token`, as the next one, would be the last; None if it would not. `context_len` in tokens."""
        generated = len(self.output) + 1
        if token in self.sampling.stop_token_ids and generated > self.sampling.min_tokens:
            return FinishReason.STOP
        if generated >= self.sampling.max_tokens or len(self.prompt) + generated >= context_len:
            return FinishReason.LENGTH
        return None
