"""What nodes say to each other. Each message travels as one frame (transport/frames.py).

`fence` is (epoch, round): the epoch of the pipeline, and the scheduler's count of re-synchronisations in
it. A receiver that has seen a later fence drops the message; that is all it takes to make a node that was
only slow harmless.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from controlplane.contract.ids import NodeId, PipelineId
from controlplane.contract.requests import Sampling


class Fence(msgspec.Struct, frozen=True, order=True, array_like=True):
    epoch: int
    round: int = 0


ROW_FIELDS = ("rid", "start", "count", "sample")
Row = tuple[int, int, int, bool]


def pack_rows(rows: Sequence[Row]) -> bytes:
    """`StepMeta.rows`, to be read with `_fast.blocktable.Rows`: columns, so that no stage looks at a row alone."""
    return np.array(rows, "<i8").reshape(-1, len(ROW_FIELDS)).T.tobytes()


def step_tokens(meta: StepMeta) -> int:
    """How many tokens a step computes."""
    return int(np.frombuffer(meta.rows, "<i8").reshape(len(ROW_FIELDS), -1)[ROW_FIELDS.index("count")].sum())


class Admit(msgspec.Struct, frozen=True, array_like=True):
    """What the last stage needs to sample: sent before a request's first row after every change of fence."""

    rid: int
    sampling: Sampling
    prompt: bytes  # int32, little endian
    output: bytes  # int32, little endian: generated so far


class StepMeta(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """One microbatch. The payload is its activations, [sum of counts, hidden], after the previous stage."""

    pipeline: PipelineId
    fence: Fence
    step: int
    rows: bytes  # see pack_rows
    admits: tuple[Admit, ...] = ()
    frees: tuple[int, ...] = ()  # requests whose KV is given back, before the rows run

    def __post_init__(self) -> None:
        if len(self.rows) % (8 * len(ROW_FIELDS)):
            raise ValueError(f"{len(self.rows)} bytes are no rows of a step")


class Detail(msgspec.Struct, frozen=True, array_like=True):
    """What a request that asked for logprobs gets with its token; `index` counts the rows that sampled."""

    index: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class ResultMeta(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The last stage to the scheduler: the step is done."""

    pipeline: PipelineId
    fence: Fence
    step: int
    tokens: bytes  # int32, little endian, of the rows that sampled, in their order
    details: tuple[Detail, ...] = ()
    # Of the rows that sampled, by index: whose grammar is still compiled (ReadyMeta says when it is), and who can have
    # no token any more, and why. Their token is -1.
    waiting: tuple[int, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()


class StepFailedMeta(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A stage to the scheduler: the step went no further."""

    pipeline: PipelineId
    fence: Fence
    step: int
    stage: int
    reason: str  # "link", "space", "gap", "numbers"
    node: NodeId = ""  # "numbers": where they ceased to be finite ...
    rids: tuple[int, ...] = ()  # ... and whose they are
    missing: int = 0  # "space": blocks that the step needed and that could not be made free


class RejoinMeta(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The scheduler to each stage: how much KV do you hold of these requests?

    A stage promotes the replicas it has of them. `complete` says that no other request of the pipeline is
    alive: what else the stage holds of it is given back.
    """

    pipeline: PipelineId
    fence: Fence
    ask: int
    rids: tuple[int, ...]
    complete: bool


class HeldMeta(msgspec.Struct, frozen=True, array_like=True, tag=5):
    pipeline: PipelineId
    fence: Fence
    ask: int
    stage: int
    held: tuple[tuple[int, int], ...]  # (rid, tokens)


class Block(msgspec.Struct, frozen=True, array_like=True):
    rid: int
    index: int  # block number within the request
    tokens: int  # valid tokens in the request once this block is stored
    checksum: int  # CRC-32 of its bytes


class KvMeta(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """KV blocks for the peer that keeps copies of them; the payload is their bytes, one after the other."""

    pipeline: PipelineId
    fence: Fence
    blocks: tuple[Block, ...]


class KvAckMeta(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The holder's watermarks. `whole` answers a query: requests not named here are not held."""

    pipeline: PipelineId
    fence: Fence
    held: tuple[tuple[int, int], ...]  # (rid, tokens stored without a gap)
    whole: bool = False
    refused: bool = False  # blocks of these were not stored (no room, a gap): go on from the watermark, later
    room: bool = False  # there is room again for what was refused


class KvQueryMeta(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """A source that (re)starts to protect a pipeline asks its holder what it already has."""

    pipeline: PipelineId
    fence: Fence
    numerics: str = ""  # of the source: a holder with others does not answer, and so gets no copies


class KvDropMeta(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The holder is to drop its copies of these; it acknowledges that nothing is left of them."""

    pipeline: PipelineId
    fence: Fence
    rids: tuple[int, ...]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Says nothing but "I am here": sent on links that would otherwise be silent."""


class ReadyMeta(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """The last stage to the scheduler: these requests, which a result said were waiting, can be drawn for."""

    pipeline: PipelineId
    fence: Fence
    rids: tuple[int, ...]


Meta = (
    StepMeta
    | ResultMeta
    | StepFailedMeta
    | RejoinMeta
    | HeldMeta
    | KvMeta
    | KvAckMeta
    | KvQueryMeta
    | KvDropMeta
    | Ping
    | ReadyMeta
)
