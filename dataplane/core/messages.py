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
from controlplane.contract.repair import Computing
from controlplane.contract.requests import Sampling
from dataplane.core.prefix import NAME_BYTES


class Fence(msgspec.Struct, frozen=True, order=True, array_like=True):
    epoch: int
    round: int = 0


# Of `count` tokens, the last `samples` are sampled behind: the first of these is the last token of the log, the others
# are drafts.
ROW_FIELDS = ("rid", "start", "count", "samples")
Row = tuple[int, int, int, int]


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
    scored: int = -1  # of the prompt's log probabilities, the scheduler has so many; -1: it wants none


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """A request's KV where its first row after a change of fence begins: full blocks by name, and of the open one
    behind them so many tokens, which the stage said that it has of this request."""

    rid: int
    names: bytes = b""  # NAME_BYTES each
    tail: int = 0


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Which pipelines' nodes are to have copies of a request's KV, where each request has a holder of its own: all that
    are not named drop theirs."""

    rid: int
    holders: tuple[PipelineId, ...]


class StepMeta(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """One microbatch. The payload is its activations, [sum of counts, hidden], after the previous stage.

    A stage does `drops`, `frees`, `begins`, `evicts`, then makes room for the rows, runs them, and names the blocks
    that they have filled. A row that begins behind drafts of an earlier one says that these were right."""

    pipeline: PipelineId
    fence: Fence
    step: int
    rows: bytes  # see pack_rows
    admits: tuple[Admit, ...] = ()
    frees: tuple[int, ...] = ()  # requests that have ended or make room: what is named of theirs is kept
    begins: tuple[Begin, ...] = ()
    evicts: bytes = b""  # names of blocks that are kept and are not to be any more, NAME_BYTES each
    seals: bytes = b""  # names of the blocks that the rows fill, in the order of rows and of positions
    drops: tuple[int, ...] = ()  # requests of which nothing counts that is here: it is not kept either
    # int32, little endian: the drafted tokens of the rows, in their order; for the last stage.
    drafts: bytes = b""
    places: tuple[Place, ...] = ()  # what has changed of who holds copies
    # `Submit.trace` of the traced requests whose prompts are in it: each stage makes a span of its computation below.
    traces: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rows) % (8 * len(ROW_FIELDS)):
            raise ValueError(f"{len(self.rows)} bytes are no rows of a step")
        if (len(self.evicts) | len(self.seals)) % NAME_BYTES:
            raise ValueError("names of blocks are cut short")


class Detail(msgspec.Struct, frozen=True, array_like=True):
    """What a request that asked for logprobs gets with its token; `index` counts what sampled."""

    index: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of tokens of a prompt, from the one at position `first` on (contract/prompt_scores.py)."""

    rid: int
    first: int
    records: bytes


class ResultMeta(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The last stage to the scheduler: the step is done."""

    pipeline: PipelineId
    fence: Fence
    step: int
    # int32, little endian, of what sampled, in the order of rows and positions; below 0 behind a draft that was wrong.
    tokens: bytes
    details: tuple[Detail, ...] = ()
    # Of the rows that sampled, by index: whose grammar is still compiled (ReadyMeta says when it is), and who can have
    # no token any more, and why. Their token is -1.
    waiting: tuple[int, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    scores: tuple[PromptScores, ...] = ()  # of requests that asked for their prompts'


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

    A stage takes up what it has of them, copies and kept blocks included. `complete` says that no other request of the
    pipeline is alive: what else the stage holds of it is kept as far as it is named. `kept`: it is to say what is kept.
    """

    pipeline: PipelineId
    fence: Fence
    ask: int
    rids: tuple[int, ...]
    complete: bool
    names: tuple[bytes, ...] = ()  # of the full blocks of each of `rids`
    kept: bool = False
    adopts: bool = True  # False: they run already, and nothing is to be taken up for them
    computing: Computing = Computing()  # what a stage weighs against restoring what it lacks


class HeldMeta(msgspec.Struct, frozen=True, array_like=True, tag=5):
    pipeline: PipelineId
    fence: Fence
    ask: int
    stage: int
    held: tuple[tuple[int, int], ...]  # (rid, tokens)
    kept: bytes = b""  # if asked for: names of the blocks that are kept, least recently used first
    # Nothing is said of requests that are not in `held`: the stage waits for blocks that it lacks, and answers again.
    more: bool = False


KEPT = -1  # in the place of a request: a block that belongs to none, and is kept for those to come


class Block(msgspec.Struct, frozen=True, array_like=True):
    rid: int
    index: int  # block number within the request
    tokens: int  # valid tokens in the request once this block is stored
    checksum: int  # CRC-32 of its bytes
    name: bytes = b""  # of a full one
    # Its bytes are in the payload; else the holder has a block of this name, as far as is known.
    data: bool = True


class KvMeta(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """KV blocks for the peer that keeps copies of them; the payload is the bytes of those with `data`, one after the
    other."""

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
    # Of blocks that are here and belong to no request: of all in a `whole` answer, else of those since the last one.
    names: bytes = b""


class KvQueryMeta(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """A source that (re)starts to protect a pipeline asks its holder what it already has."""

    pipeline: PipelineId
    fence: Fence
    numerics: str = ""  # of the source: a holder with others does not answer, and so gets no copies


class KvDropMeta(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The holder is to drop its copies of these; it acknowledges that nothing is left of them. What is named of them it
    keeps as far as it has room, until it is among `evicts`: then the source has it no longer."""

    pipeline: PipelineId
    fence: Fence
    rids: tuple[int, ...]
    evicts: bytes = b""  # names, NAME_BYTES each
    keep: bool = True  # False: the source knows nothing of these requests, so nothing of them is kept


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Says nothing but "I am here": sent on links that would otherwise be silent."""


class ReadyMeta(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """The last stage to the scheduler: these requests, which a result said were waiting, can be drawn for."""

    pipeline: PipelineId
    fence: Fence
    rids: tuple[int, ...]


class LostMeta(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """A stage to the scheduler: these blocks, which it was to keep, have changed in memory."""

    pipeline: PipelineId
    fence: Fence
    names: bytes  # NAME_BYTES each


class CopiedMeta(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """A stage to the scheduler: the holder has acknowledged what the stage had of the request when it was told to copy
    it there (`Place`)."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    placed: tuple[tuple[int, PipelineId], ...]  # request, holder
    lost: tuple[tuple[int, PipelineId], ...] = ()  # was there, and is so no longer; known before `placed`


class LoadMeta(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """The scheduler of a pipeline to those whose requests it may hold copies of: how much it has to do."""

    pipeline: PipelineId
    fence: Fence
    work: int  # in tokens: contract/loads.py


class Shape(msgspec.Struct, frozen=True, array_like=True):
    """Of the parity over one block of every stage."""

    code: str  # of kernels/coding: "xor", "rdp", "rs"
    shards: int  # N: stages
    parities: int  # K
    longest: int  # bytes of the longest shard: stages may have different numbers of layers


def _check_names(*fields: bytes) -> None:
    if any(len(names) % NAME_BYTES for names in fields):
        raise ValueError("names of blocks are cut short")


def _check_sums(names: bytes, sums: tuple[int, ...]) -> None:
    if len(names) != NAME_BYTES * len(sums):
        raise ValueError(f"{len(sums)} checksums of {len(names)} bytes of names")


class ShardMeta(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """Full blocks of one stage for the encoder that keeps parity over all stages' blocks of these names. The payload is
    their bytes, one behind the other, all of one size."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    shape: Shape
    names: bytes  # NAME_BYTES each
    sums: tuple[int, ...]  # CRC-32 of each

    def __post_init__(self) -> None:
        _check_sums(self.names, self.sums)


class ShardAckMeta(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """An encoder to a stage, of that stage's shards. All fields but `flags` are names, NAME_BYTES each."""

    pipeline: PipelineId
    fence: Fence
    added: bytes = b""  # in the parity
    complete: bytes = b""  # in it are the shards of all stages: what of them is lost can be restored
    damaged: bytes = b""  # arrived with other bytes: to be sent again
    full: bytes = b""  # there is no room
    gone: bytes = b""  # dropped, because another stage said so
    left: bytes = b""  # there is nothing of them any more, as this stage has said
    # Answers a query: all names of the pipeline that there are here, and a byte for each: 1 if the stage's shard is in,
    # plus 2 if all are.
    whole: bool = False
    names: bytes = b""
    flags: bytes = b""

    def __post_init__(self) -> None:
        _check_names(self.added, self.complete, self.damaged, self.full, self.gone, self.left, self.names)
        if len(self.names) != NAME_BYTES * len(self.flags):
            raise ValueError(f"{len(self.flags)} flags of {len(self.names)} bytes of names")


class ShardQueryMeta(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """A stage to an encoder: what do you have of this pipeline?"""

    pipeline: PipelineId
    fence: Fence
    stage: int


class ShardDropMeta(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """A stage to an encoder: these names are not cached any more. Acknowledged as `left`."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    names: bytes

    def __post_init__(self) -> None:
        _check_names(self.names)


class RestoreMeta(msgspec.Struct, frozen=True, array_like=True, tag=24):
    """A stage that lacks its blocks of these names to an encoder that may have their parity."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    names: bytes

    def __post_init__(self) -> None:
        _check_names(self.names)


class FetchMeta(msgspec.Struct, frozen=True, array_like=True, tag=25):
    """An encoder to a stage: send me your blocks of these names, another stage has lost its own."""

    pipeline: PipelineId
    fence: Fence
    names: bytes

    def __post_init__(self) -> None:
        _check_names(self.names)


class SurvivorMeta(msgspec.Struct, frozen=True, array_like=True, tag=26):
    """The answer: the payload is the blocks of `names`, all of one size; those of `lacks` are not here."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    names: bytes
    sums: tuple[int, ...]
    lacks: bytes = b""

    def __post_init__(self) -> None:
        _check_sums(self.names, self.sums)
        _check_names(self.lacks)


class RestoredMeta(msgspec.Struct, frozen=True, array_like=True, tag=27):
    """An encoder to the stage that asked: the payload is its blocks of `names`; `refused` cannot be restored."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    names: bytes
    sums: tuple[int, ...]
    refused: bytes = b""

    def __post_init__(self) -> None:
        _check_sums(self.names, self.sums)
        _check_names(self.refused)


ParityMeta = (
    ShardMeta
    | ShardAckMeta
    | ShardQueryMeta
    | ShardDropMeta
    | RestoreMeta
    | FetchMeta
    | SurvivorMeta
    | RestoredMeta
)

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
    | LostMeta
    | CopiedMeta
    | LoadMeta
    | ParityMeta
)
