"""What happens to the router, and what it wants done: two closed vocabularies (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.requests import (
    Cancel,
    Log,
    Recall,
    Recalled,
    Refused,
    Sampling,
    Submit,
    Token,
    Tokens,
)
from controlplane.contract.topology import Topology


@dataclass(frozen=True, slots=True)
class TopologySeen:
    topology: Topology


@dataclass(frozen=True, slots=True)
class SubmitAsked:
    """A request of a client. The fields from `context` on are for those that can be resumed, or are (see Submit)."""

    rid: int
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0
    context: bytes | None = None
    resumed: bool = False  # admitted once: it may wait, but it is not turned away
    emitted: tuple[int, ...] = ()  # known already
    home: PipelineId | None = None  # whose scheduler has it
    reader: int = 0
    reader_age_s: float = 0.0  # for how long its client has been here


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The client is gone, or a stop string ended the stream."""

    rid: int


@dataclass(frozen=True, slots=True)
class LeaveAsked:
    """Its client is told to go on elsewhere: the scheduler keeps it running for the grace."""

    rid: int


@dataclass(frozen=True, slots=True)
class RecallAsked:
    """Find out who has a request, within `limit_s`."""

    rid: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class RecalledReceived:
    member: Member
    recalled: Recalled


class TokensReceived(msgspec.Struct, frozen=True):  # like Deliver: made far more often than the others
    member: Member  # whose stream they came on
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class RefusalReceived:
    member: Member
    refusal: Refused


@dataclass(frozen=True, slots=True)
class StreamUp:
    member: Member


@dataclass(frozen=True, slots=True)
class StreamDown:
    member: Member


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Closing:
    """The gateway was told to stop: it takes no new requests."""


@dataclass(frozen=True, slots=True)
class ShutDown:
    """The gateway is about to exit: what still runs ends now, with an error that says so."""


Event = (
    TopologySeen
    | SubmitAsked
    | CancelAsked
    | LeaveAsked
    | RecallAsked
    | RecalledReceived
    | TokensReceived
    | RefusalReceived
    | StreamUp
    | StreamDown
    | Tick
    | Closing
    | ShutDown
)


class FailCode(StrEnum):
    OVERLOADED = "overloaded"  # 429: every pipeline's queue, or this gateway, is full
    UNAVAILABLE = "unavailable"  # 503: no pipeline serves
    INVALID = "invalid"  # 400: the engine says it can never run
    QUARANTINED = "quarantined"  # 500: it broke steps or nodes, and is not tried again
    MISMATCH = "mismatch"  # 500: a repeated position carried another token
    ENGINE = "engine"  # 500: the engine ended it with an error
    SUPERSEDED = "superseded"  # 409: its client has another connection for it


@dataclass(frozen=True, slots=True)
class OpenStream:
    member: Member


@dataclass(frozen=True, slots=True)
class CloseStream:
    member: Member


@dataclass(frozen=True, slots=True)
class SendSubmit:
    member: Member
    submit: Submit


@dataclass(frozen=True, slots=True)
class SendCancel:
    member: Member
    cancel: Cancel


@dataclass(frozen=True, slots=True)
class SendRecall:
    member: Member
    recall: Recall


@dataclass(frozen=True, slots=True)
class RecallDone:
    """`sure`: every scheduler of the topology was asked and has answered."""

    rid: int
    log: Log | None
    sure: bool


class Deliver(msgspec.Struct, frozen=True):
    """The next tokens of a stream. `gap_s` is set on the first ones after a failure or a switch: how long the
    client had to wait for them since its last token; `how` says how the stream got over it.
    """

    rid: int
    tokens: tuple[Token, ...]
    gap_s: float | None = None
    how: str = ""


@dataclass(frozen=True, slots=True)
class Fail:
    rid: int
    code: FailCode
    message: str
    retry_after_s: float = 0.0


Effect = OpenStream | CloseStream | SendSubmit | SendCancel | SendRecall | RecallDone | Deliver | Fail
