"""The topology of one group: who serves which stage of which pipeline, in which epoch.

It is one value in etcd, written whole by the leader with a compare-and-swap, and the only channel by
which the control plane tells the data plane anything: nodes and gateways watch it and act on what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import ClassVar

import msgspec

from controlplane.contract.ids import Member, NodeId, PipelineId


class Mode(StrEnum):
    """What protects a group (PAPERS.md, "Baselines that we keep as modes")."""

    REPLICATE = "replicate"  # copy KV to a peer; borrow a peer on failure
    PARITY = "parity"  # code KV over the stages, on nodes of other pipelines; borrow a peer on failure
    NONE = "none"  # borrow a peer on failure, recompute from the token log
    STOP_RESTART = "stop-restart"  # an instance with a dead node is gone until it has been restarted
    # Each request's KV is copied to the instance that its scheduler chooses; the requests of an instance that failed go
    # on at those, and nothing is borrowed.
    LOAD_AWARE = "load-aware"  # chosen by load, and left alone where it has become too much (LUMEN)
    FIXED_NEIGHBOUR = "fixed-neighbour"  # the next instance, whatever it has to do: for comparison


HOLDER_MODES = frozenset({Mode.LOAD_AWARE, Mode.FIXED_NEIGHBOUR})


class MovePhase(StrEnum):
    COPY = "copy"  # KV is copied to the destination while the pipeline serves
    QUIESCE = "quiesce"  # written by older code only, whose schedulers hold steps back in it before a switch


class Move(msgspec.Struct, frozen=True, gc=False):
    """A planned change of the node that serves one stage: its KV is copied, then the epoch is switched."""

    stage: int
    to: Member
    reason: str  # "hand-back", or the id of the operation that asked for it
    phase: MovePhase = MovePhase.COPY

    identity: ClassVar[tuple[str, ...]] = ("stage", "to")


class Stage(msgspec.Struct, frozen=True, gc=False):
    """One stage of a pipeline, known by its place.

    `ranks` has one member for each tensor-parallel rank; empty: nobody serves.
    """

    homes: tuple[NodeId, ...]  # the nodes that serve when all is well, one a rank
    ranks: tuple[Member, ...] = ()
    replicas: tuple[Member, ...] = ()  # where the serving rank copies its KV; empty: unprotected

    @property
    def leader(self) -> Member | None:
        """Rank 0, which owns the stage's links."""
        return self.ranks[0] if self.ranks else None


class Pipeline(msgspec.Struct, frozen=True, gc=False):
    """One instance of the model. `epoch` is the counter of the write that last changed who serves it."""

    id: PipelineId
    epoch: int
    stages: tuple[Stage, ...]
    move: Move | None = None
    closing: bool = False  # takes no new request, and is removed once its streams have ended
    moved: int = 0  # the last epoch that a planned move began: nobody died for it

    identity: ClassVar[tuple[str, ...]] = ("id",)

    @property
    def up(self) -> bool:
        """Whether somebody serves every stage. Without stages, as only another hand can write it, nobody serves it."""
        return bool(self.stages) and all(stage.ranks for stage in self.stages)

    @property
    def scheduler(self) -> Member | None:
        """The member that runs the scheduler, or None while the pipeline is down."""
        return self.stages[0].leader if self.up else None

    def leader_at(self, stage: int) -> Member | None:
        """Rank 0 of a stage; None: nobody serves it, or there is no such stage in what was read."""
        return self.stages[stage].leader if 0 <= stage < len(self.stages) else None

    def members(self) -> Iterator[Member]:
        for stage in self.stages:
            yield from stage.ranks

    def stages_of(self, member: Member) -> list[int]:
        return [index for index, stage in enumerate(self.stages) if member in stage.ranks]


class Topology(msgspec.Struct, frozen=True, gc=False):
    """The whole value. `counter` grows by one with each write and is never used twice."""

    group: str
    counter: int
    mode: Mode
    pipelines: tuple[Pipeline, ...]
    cordoned: tuple[NodeId, ...] = ()  # get no new duty: not donors, not replica targets, not handed back to
    retired: tuple[Member, ...] = ()  # must exit; their launcher starts a fresh incarnation
    paused: bool = False  # automation is off: nothing is planned until it is resumed
    # Are to end: what they serve and hold moves away, and once nothing here names them their launchers stop them.
    leaving: tuple[NodeId, ...] = ()

    identity: ClassVar[tuple[str, ...]] = ("group",)

    def pipeline(self, pipeline_id: PipelineId) -> Pipeline | None:
        for pipeline in self.pipelines:  # several times a step, and a generator is slower
            if pipeline.id == pipeline_id:
                return pipeline
        return None

    def serving(self, node: NodeId) -> list[tuple[PipelineId, int]]:
        """Every (pipeline, stage) that any incarnation of `node` serves."""
        return [
            (p.id, index)
            for p in self.pipelines
            for index, stage in enumerate(p.stages)
            if any(member.node == node for member in stage.ranks)
        ]

    @property
    def copies(self) -> bool:
        """Whether nodes that serve hold copies of other pipelines, too: a lone pipeline's are with spares."""
        return (self.mode is Mode.REPLICATE or self.mode in HOLDER_MODES) and len(self.pipelines) > 1


def switched(before: Pipeline, after: Pipeline) -> bool:
    """Whether a planned move led from one to the other, and not a death. Older leaders do not write `moved`: theirs was
    one if the destination took over from a pipeline that was quiesced."""
    if after.moved == after.epoch:
        return after.epoch > before.epoch
    move = before.move
    if move is None or move.phase is not MovePhase.QUIESCE or after.move is not None:
        return False
    # None, where a topology is not what it should be.
    return any(at.ranks == (move.to,) for at in after.stages[move.stage : move.stage + 1])


def quota_blocks(pool_blocks: int, pipelines_served: int, copies: bool = True) -> int:
    """KV blocks that one pipeline may use on a node: its share among those that the node serves, and half the pool at
    most where such nodes hold copies of others.

    The other half is room for replicas, and therefore for the pipeline that a peer's death brings: promoting
    its replicas can never run out of space.
    """
    return pool_blocks // max(2 if copies else 1, pipelines_served)


def change_of(old: Pipeline, new: Pipeline | None) -> str:
    """From one epoch to another, in words."""
    if new is None:
        return f"{old.id} was removed"
    moves = []
    for index, (was, now) in enumerate(zip(old.stages, new.stages, strict=False)):
        gone, come = set(was.ranks) - set(now.ranks), set(now.ranks) - set(was.ranks)
        if gone or come:
            left = ", ".join(sorted(member.node for member in gone)) or "nobody"
            serves = ", ".join(sorted(member.node for member in now.ranks)) or "nobody"
            moves.append(f"stage {index}: {left} -> {serves}")
    kind = "planned switch" if switched(old, new) else "failure"
    what = "; ".join(moves) or "the same members"
    return f"{kind} of {new.id}, epoch {old.epoch} -> {new.epoch}: {what}"
