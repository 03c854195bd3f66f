"""What a scheduler is told and what it wants done. Results, failed steps and answers are events as they come."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.ids import PipelineId
from controlplane.contract.requests import Refused, Submit, Token
from dataplane.core.messages import (
    CopiedMeta,
    HeldMeta,
    LoadMeta,
    LostMeta,
    ReadyMeta,
    RejoinMeta,
    ResultMeta,
    StepFailedMeta,
    StepMeta,
)
from dataplane.core.recovery import RecoveryTiming


@dataclass(frozen=True, slots=True)
class Submitted:
    message: Submit
    session: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    rid: int
    session: int | None = None  # who says so: only the reader's own word counts; None: anybody's


@dataclass(frozen=True, slots=True)
class SessionLost:
    """A gateway's stream broke: its requests go on for a grace time."""

    session: int


@dataclass(frozen=True, slots=True)
class EpochBegan:
    epoch: int
    planned: bool
    salt: bytes = b""  # what decides the bits of KV besides tokens: see PrefixHasher


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """What the pipeline's nodes can take: KV blocks on each of them, and microbatches that can compute at a time."""

    blocks: int
    microbatches: int
    shared: int = 1  # pipelines that its busiest node serves: so many share that node's time


@dataclass(frozen=True, slots=True)
class CandidatesChanged:
    """Who may hold copies of requests, in the order of the ring; None: requests have no holders of their own."""

    candidates: tuple[PipelineId, ...] | None
    fixed: bool = False  # always the first one


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    Submitted
    | Cancelled
    | SessionLost
    | EpochBegan
    | CapacityChanged
    | CandidatesChanged
    | Tick
    | ResultMeta
    | StepFailedMeta
    | HeldMeta
    | ReadyMeta
    | LostMeta
    | CopiedMeta
    | LoadMeta
)


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run `meta` on stage 0 with these token ids, one for each row position."""

    meta: StepMeta
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Send to every stage."""

    meta: RejoinMeta


@dataclass(frozen=True, slots=True)
class Deliver:
    session: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Tell:
    """Who holds copies of requests from now on: (request, pipeline), None being nobody."""

    session: int
    holders: tuple[tuple[int, PipelineId | None], ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    session: int
    message: Refused


@dataclass(frozen=True, slots=True)
class Recovered:
    timing: RecoveryTiming


Effect = RunStep | Ask | Deliver | Tell | Refuse | Recovered
