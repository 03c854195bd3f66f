"""A request as its scheduler keeps it: the token log, and how far its KV has come."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from controlplane.contract.ids import PipelineId
from controlplane.contract.prompt_scores import PROMPT_SCORES_BYTES_MAX, score_record, scores_bytes
from controlplane.contract.request_bytes import TOKEN_BYTES, sampling_bytes
from controlplane.contract.requests import GRAMMAR_BYTES_MAX, FinishReason, Log, Sampling, Submit, Token
from dataplane.core.messages import Admit, Begin
from dataplane.core.ngrams import NgramIndex
from dataplane.core.prefix import NAME_BYTES, PrefixHasher

PROMPT_LOGPROBS_TOP_MAX = 20
BAD_WORDS_MAX, BAD_WORD_TOKENS_MAX = 256, 64  # of a request, and of one of them
NAMED_BYTES = 64 + NAME_BYTES  # of the name of a block
OUTPUT_BYTES, TOP_BYTES = 210, 128  # of a generated token, and of one of the likeliest beside it
REQUEST_BYTES = 2048  # all else


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
    ids.extend(token for word in sampling.bad_words for token in word)
    if sampling.min_tokens > 0:
        ids.extend(sampling.stop_token_ids)
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        return f"token id {wrong} is outside the model's vocabulary of {vocab_size}"
    if not 0.0 <= sampling.min_p <= 1.0:
        return f"min_p {sampling.min_p} is not in [0, 1]"
    if len(sampling.bad_words) > BAD_WORDS_MAX or not all(
        0 < len(word) <= BAD_WORD_TOKENS_MAX for word in sampling.bad_words
    ):
        return f"more than {BAD_WORDS_MAX} bad words, or one that has not 1 to {BAD_WORD_TOKENS_MAX} tokens"
    if (top := sampling.prompt_logprobs) is not None:
        if not 0 <= top <= PROMPT_LOGPROBS_TOP_MAX:
            return f"prompt_logprobs {top} is not in [0, {PROMPT_LOGPROBS_TOP_MAX}]"
        if (size := scores_bytes(len(message.prompt), top)) > PROMPT_SCORES_BYTES_MAX:
            return f"its prompt's log probabilities have {size} bytes, at most {PROMPT_SCORES_BYTES_MAX} are taken"
    if len(sampling.grammar) > GRAMMAR_BYTES_MAX:
        return f"its grammar has {len(sampling.grammar)} characters, at most {GRAMMAR_BYTES_MAX} are taken"
    return None


def bytes_of(prompt_len: int, sampling: Sampling, context: bytes | None) -> int:
    """About what a scheduler keeps of a request, its output aside: that is bounded by the KV pool."""
    return (
        REQUEST_BYTES
        + TOKEN_BYTES * prompt_len
        + sampling_bytes((sampling,))
        + len(sampling.cache_salt.encode())  # once more, as the salt
        + (0 if sampling.prompt_logprobs is None else scores_bytes(prompt_len, sampling.prompt_logprobs))
        + (0 if context is None else len(context))
    )


@dataclass(slots=True)
class Request:
    """Positions count prompt and output together. `issued` of them, <= total, have been given to the stages, which
    handle steps in order: so several chunks of one prompt may be on their way through the pipeline.
    """

    rid: int
    ids: list[int]  # the token log: prompt, then output
    prompt_len: int
    sampling: Sampling
    priority: int
    order: int  # of arrival
    session: int | None  # the gateway stream that listens; None while there is none
    output: list[Token] = field(default_factory=list)  # as it was delivered
    phase: Phase = Phase.WAITING
    issued: int = 0
    # Positions whose KV stages have been told to be what the log says: `issued` or, with drafts, less.
    settled: int = 0
    # Position from which on blocks are its own alone, so that drafts may be written to them.
    drafts_from: int = 0
    # It has had a token in the present fence: its grammar, if it has one, is compiled there.
    followed: bool = False
    ngrams: NgramIndex | None = None  # of its log, while it runs and drafts are made of it
    computed: int = 0  # positions that had run before a recovery, as far as is known here
    attempt: int = 0  # preemptions and recoveries: results of an older attempt are not for this one
    announced: bool = False  # the last stage knows the token log, in the present fence
    cached: int = 0  # positions that it began with, found in the cache
    turn: int = 0  # of the batcher, when it last had rows
    # Since when the last stage compiles its grammar: it has no rows until then.
    blocked_at: float | None = None
    interrupted: bool = False  # by a failure or a move, and since then it has had no token
    orphaned_at: float | None = None
    context: bytes | None = None  # of the gateway that may resume it; None: nobody may
    reader: int = 0
    arrived: float = 0.0  # monotonic seconds
    salt: bytes = b""  # what it shares KV under
    scores_missed: int = 0  # times that its prompt was computed and they did not come
    scores: bytes | bytearray = b""  # log probabilities of its prompt's tokens, as far as they have come
    hasher: PrefixHasher = field(default_factory=lambda: PrefixHasher(1 << 30))

    @classmethod
    def from_submit(cls, message: Submit, order: int, session: int) -> Request:
        output = [Token(message.rid, i, token) for i, token in enumerate(message.emitted)]
        return cls(
            message.rid,
            [*message.prompt, *message.emitted],
            len(message.prompt),
            message.sampling,
            message.priority,
            order,
            session,
            output,
            computed=len(message.prompt) + len(output) - 1 if output else 0,
            context=message.context,
            reader=message.reader,
            salt=message.sampling.cache_salt.encode(),
        )

    @property
    def bytes_kept(self) -> int:
        return bytes_of(self.prompt_len, self.sampling, self.context)

    @property
    def log_bytes(self) -> int:
        """About what is kept of it when it has no KV any more: its output counts, too."""
        top, scores = self.sampling.logprobs or 0, self.output[0].prompt_scores if self.output else None
        return (
            self.bytes_kept
            + (OUTPUT_BYTES + TOP_BYTES * top) * len(self.output)
            + (0 if scores is None else len(scores))
            + NAMED_BYTES * len(self.hasher.names)
            + (0 if self.ngrams is None else self.ngrams.bytes_kept)
        )

    @property
    def total(self) -> int:
        return len(self.ids)

    @property
    def finished(self) -> bool:
        return bool(self.output) and self.output[-1].finish is not None

    @property
    def lost(self) -> bool:
        """Somebody reads it and has had no token since a failure: all wait until what it lost is computed again."""
        return self.interrupted and bool(self.output)

    def lacks_logprobs(self, start: int) -> bool:
        """Whether output from `start` on came from an earlier scheduler's log, without what the client asked for."""
        again = self.output[start:]
        if (
            self.sampling.prompt_logprobs is not None
            and start == 0
            and again
            and again[0].prompt_scores is None
        ):
            return True
        return self.sampling.logprobs is not None and any(t.logprob is None for t in again)

    def truncate(self, generated: int) -> None:
        """Forget the output from there on: it will be computed again, the same."""
        del self.ids[self.prompt_len + generated :], self.output[generated:]
        self.hasher.cut(self.total)
        self.ngrams = None

    @property
    def names(self) -> list[bytes]:
        """Of the blocks that its tokens fill."""
        self.hasher.extend(self.ids)
        return self.hasher.names

    @property
    def scored(self) -> int:
        """Tokens of the prompt whose log probabilities have come; the first one has none, and does not count."""
        top = self.sampling.prompt_logprobs
        return 0 if top is None else len(self.scores) // score_record(top).itemsize

    @property
    def scoring(self) -> bool:
        """Whether log probabilities of its prompt are still to come. Whoever has a token of it has them."""
        if self.sampling.prompt_logprobs is None or self.output:
            return False
        return self.scored < self.prompt_len - 1

    @property
    def known_max(self) -> int:
        """Positions that it can go on from at most, however much of its KV there is: the rest has to be computed, for
        its last token, or for log probabilities of its prompt. Those begin with a block of their own."""
        size = self.hasher.block_size
        return self.scored // size * size if self.scoring else self.total - 1

    def take_scores(self, first: int, records: bytes) -> None:
        """Log probabilities of the prompt's tokens from position `first` on; what is here already stays."""
        assert self.sampling.prompt_logprobs is not None
        have = self.scored - (first - 1)
        if have >= 0:
            if isinstance(self.scores, bytes):
                self.scores = bytearray(self.scores)
            self.scores += records[have * score_record(self.sampling.prompt_logprobs).itemsize :]

    @property
    def shareable(self) -> list[bytes]:
        """Names of the blocks that need not be computed if they are there: the last token always is."""
        return self.names[: self.known_max // self.hasher.block_size]

    def begin(self) -> Begin:
        """What a stage is to take up of it before its next row."""
        full, tail = divmod(self.issued, self.hasher.block_size)
        self.settled = self.issued
        return Begin(self.rid, b"".join(self.names[:full]), tail)

    def log(self, pipeline: PipelineId) -> Log | None:
        """For a gateway that resumes it."""
        if self.context is None:
            return None
        prompt, emitted = tuple(self.ids[: self.prompt_len]), tuple(self.ids[self.prompt_len :])
        return Log(pipeline, prompt, self.sampling, emitted, self.context, self.reader)

    def admit(self) -> Admit:
        prompt, output = self.ids[: self.prompt_len], self.ids[self.prompt_len :]
        scored = self.scored if self.scoring else -1
        return Admit(self.rid, self.sampling, pack_tokens(prompt), pack_tokens(output), scored)

    def append(self, token: Token) -> None:
        self.ids.append(token.token)
        self.output.append(token)
        self.followed = True
        self.interrupted = False

    def rewind(self, phase: Phase, position: int = 0) -> None:
        """Forget what is in flight and start again from `position`.

        What is written to the rest of a block that a stage takes up has to be what the log says: others may have it."""
        self.drafts_from = -(-position // self.hasher.block_size) * self.hasher.block_size
        self.phase = phase
        self.issued = position
        self.attempt += 1
        self.announced = self.followed = False
        self.blocked_at = None
        self.ngrams = None

    def ngrams_after(self, count: int) -> list[int]:
        """Up to `count` tokens that followed when its log last had its present end."""
        if self.ngrams is None:
            self.ngrams = NgramIndex()
        self.ngrams.extend(self.ids)
        return self.ngrams.after(count)

    def draft_room(self, context_len: int) -> int:
        """How many drafts its next row may have: behind the last token that it may have none is of use."""
        if self.sampling.bad_words or self.total < self.drafts_from:
            return 0
        if self.sampling.grammar and not self.followed:
            return 0
        return max(0, min(self.sampling.max_tokens - len(self.output), context_len - self.total) - 1)

    def unblock(self) -> None:
        """Its grammar is there: the last position is computed again, and its next token drawn."""
        if self.blocked_at is not None:
            self.blocked_at = None
            self.issued = self.total - 1

    def finish_of(self, token: int, context_len: int) -> FinishReason | None:
        """Why `token`, as the next one, would be the last; None if it would not. `context_len` in tokens."""
        generated = len(self.output) + 1
        # With a grammar a stop token may come earlier: where nothing else was allowed (draw.h).
        early = bool(self.sampling.grammar)
        if token in self.sampling.stop_token_ids and (early or generated > self.sampling.min_tokens):
            return FinishReason.STOP
        if generated >= self.sampling.max_tokens or self.total + 1 >= context_len:
            return FinishReason.LENGTH
        return None
