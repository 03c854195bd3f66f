"""Requests between gateway and scheduler. A request is its prompt, its sampling, its seed and its emitted tokens."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from controlplane.contract.ids import NodeId, PipelineId

SAMPLING_VERSION = 1  # of what a scheduler and a last stage know of Sampling; 1: prompt_logprobs, bad_words
GRAMMAR_BYTES_MAX = 128 << 10  # of a grammar's text: stages get it anew after each failure


class Sampling(msgspec.Struct, frozen=True):
    """What decides the next token beside the token log. Resolved by the gateway: no defaults from elsewhere."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # stop tokens are masked before
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence tokens included, unless the client said ignore_eos
    logprobs: int | None = None  # None: off; k: the chosen token and the k most likely
    # None: off; k: of each token of the prompt but the first its log probability, and the k most likely ones
    prompt_logprobs: int | None = None
    # Sequences of tokens that the output must not contain: the last one of each is not drawn after the others.
    bad_words: tuple[tuple[int, ...], ...] = ()
    # What the output has to match, as llguidance has it (Lark, or JSON with Lark or JSON schemas in it); "": anything.
    # A stop token is drawn only where the grammar may end.
    grammar: str = ""
    cache_salt: str = ""  # cached KV is shared among requests of equal salts only


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token
    LENGTH = "length"  # max_tokens or the model's context
    ERROR = "error"  # see ErrorCode in the item


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Start a request, or go on with one: `emitted` is what its client already has.

    Idempotent: for a request that the scheduler already runs it re-attaches the sender, and tokens from
    position len(emitted) on are sent again.
    """

    rid: int
    pipeline: PipelineId
    prompt: tuple[int, ...]
    sampling: Sampling
    emitted: tuple[int, ...] = ()
    priority: int = 0  # lower runs first
    admitted: bool = False  # an earlier scheduler accepted it: it may not be refused for load
    # Opaque to schedulers, kept with the log for the gateway that may go on with the stream; None: nobody may.
    context: bytes | None = None
    # Grows each time a client takes its stream up again: who reads for a lower one is told SUPERSEDED. The microsecond
    # (since 1970) in which that client came, or one above what the log has if that is more; 0: nobody can come back.
    reader: int = 0
    # W3C `traceparent` of the gateway's span, below which the scheduler and the stages put theirs; "": not traced.
    trace: str = ""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody reads it (any more): give its KV back. With a context its log is kept for the orphan grace."""

    rid: int
    pipeline: PipelineId


class Recall(msgspec.Struct, frozen=True, tag="recall"):
    """Does any scheduler of this member know the request? It says so with Recalled."""

    rid: int


GatewayMessage = Submit | Cancel | Recall


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One token of one stream. `position` counts generated tokens from 0."""

    rid: int
    position: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None  # this is the last token
    cached: int = 0  # with the first one: tokens of the prompt whose KV was here already
    # With the first one, if asked for: log probabilities of the prompt's tokens (prompt_scores.py).
    prompt_scores: bytes | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    pipeline: PipelineId
    epoch: int
    items: tuple[Token, ...]
    # Where each request's KV is copied to a pipeline of its own: who has the copy of which from now on (None: nobody).
    holders: tuple[tuple[int, PipelineId | None], ...] = ()


class RefusalCode(StrEnum):
    OVERLOADED = "overloaded"  # try another pipeline or later
    NOT_HERE = "not_here"  # this member does not run that pipeline's scheduler (any more, or yet)
    DROPPED = "dropped"  # it ran here, but this member's scheduler of that pipeline is no more
    POISONED = "poisoned"  # its numbers became non-finite on `node`: that node's fault, or its own
    INVALID = "invalid"  # can never run here (too long for the pool)
    SUPERSEDED = "superseded"  # its client reads it through another connection now


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request does not (or no longer) run here, and why."""

    rid: int
    pipeline: PipelineId
    code: RefusalCode
    message: str
    retry_after_s: float = 0.0
    node: NodeId = ""  # POISONED: where
    # SUPERSEDED: the later reader that the scheduler knows, where it has not accepted the Submit. None: it had, and a
    # newer connection has come since (or its code is older, and does not say).
    reader: int | None = None


class Log(msgspec.Struct, frozen=True):
    """A request as its scheduler has it. Logprobs are not here: Submit brings them with the tokens."""

    pipeline: PipelineId
    prompt: tuple[int, ...]
    sampling: Sampling
    emitted: tuple[int, ...]
    context: bytes
    reader: int


class Recalled(msgspec.Struct, frozen=True, tag="recalled"):
    """The answer to Recall. None: not here, not any more, or not to be resumed."""

    rid: int
    log: Log | None = None


SchedulerMessage = Tokens | Refused | Recalled
