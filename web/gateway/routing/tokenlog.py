"""The token log of one request: all that is needed to continue it anywhere (pure).

It is the gateway's copy that counts: a token is part of the stream once it has been accepted here, and
nothing else ever is. Whoever produced it, the client sees each position once and in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from controlplane.contract.requests import FinishReason, Sampling, Token


class Verdict(Enum):
    NEXT = "next"  # appended: deliver it
    DUPLICATE = "duplicate"  # the client has it already; drop it
    STALE = "stale"  # from an epoch that is over; drop it
    GAP = "gap"  # an earlier position is missing: ask the scheduler again
    MISMATCH = "mismatch"  # differs from what the client already has: the stream cannot go on


@dataclass(slots=True)
class TokenLog:
    """`fence` is the epoch in which the topology last gave this stream another scheduler: older senders are refused.
    A scheduler that goes on in a new epoch is no older sender. It sends in order and keeps what it has sent: what is
    on its way is what it would answer if we refused it.

    Tokens do not raise it. A scheduler may know of an epoch a moment earlier than the gateway does, and its
    tokens count; but a number that no topology ever named must not be able to shut a stream.

    Epochs of different pipelines are counters of one topology, but a pipeline that has not changed for long
    has a small one; so a request that moves to another pipeline starts with that pipeline's fence (`rebase`).
    """

    rid: int
    prompt: tuple[int, ...]
    sampling: Sampling
    emitted: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    fence: int = 0

    def accept(self, token: Token, epoch: int) -> Verdict:
        """Append `token` if and only if it is the next one and comes from no older epoch than the fence.

        A repeated position must carry the same token: equal bits on every path is what makes continuing a
        stream elsewhere lawful at all, so a difference is reported, never papered over.
        """
        if epoch < self.fence:
            return Verdict.STALE
        have = len(self.emitted)
        if token.position < have:
            same = self.emitted[token.position] == token.token
            return Verdict.DUPLICATE if same else Verdict.MISMATCH
        if self.finish is not None:
            return Verdict.DUPLICATE
        if token.position > have:
            return Verdict.GAP
        self.emitted.append(token.token)
        self.finish = token.finish
        return Verdict.NEXT

    def raise_fence(self, epoch: int) -> None:
        """Another scheduler has the stream from `epoch` on: what older ones still send is void."""
        self.fence = max(self.fence, epoch)

    def rebase(self, epoch: int) -> None:
        """The request goes on in another pipeline, whose epoch is `epoch`."""
        self.fence = epoch

    @property
    def outstanding(self) -> int:
        """Tokens of work that are left at most: the prompt (until a first token came) and the output."""
        left = self.sampling.max_tokens - len(self.emitted)
        return left if self.emitted else left + len(self.prompt)
