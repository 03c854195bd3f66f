"""Making the next topology from this one. The counter and the epochs are stamped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology


def initial(config: ClusterConfig, counter: int) -> Topology:
    """Every pipeline with its homes, and nobody serving yet (epoch 0)."""
    pipelines = tuple(
        Pipeline(
            id=f"p{i}",
            epoch=0,
            stages=tuple(Stage(homes=(config.node_name(i, s),)) for s in range(config.stages)),
        )
        for i in range(config.instances)
    )
    return Topology(group=config.group, counter=counter, mode=config.mode, pipelines=pipelines)


def resumed(topology: Topology, counter: int) -> Topology:
    """What an etcd that was restored from a snapshot has, as the next topology: later ones, on which nodes have
    acted, are lost. Every pipeline begins a new epoch, so that nothing of those counts; moves are called off."""
    pipelines = tuple(replace(p, epoch=counter, move=None) for p in topology.pipelines)
    return replace(topology, counter=counter, pipelines=pipelines)


def with_stage(pipeline: Pipeline, index: int, **changes: Any) -> Pipeline:
    """The pipeline with fields of one stage changed."""
    stages = list(pipeline.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(pipeline, stages=tuple(stages))


def successor(
    before: Topology,
    *pipelines: Pipeline,
    mode: Mode | None = None,
    cordoned: Iterable[NodeId] | None = None,
    retired: Iterable[Member] | None = None,
    paused: bool | None = None,
) -> Topology:
    """`before` with some pipelines (by id) and lists replaced: counter + 1, new epochs where ranks changed."""
    counter = before.counter + 1
    changed = {p.id: p for p in pipelines}
    return replace(
        before,
        counter=counter,
        mode=before.mode if mode is None else mode,
        pipelines=tuple(_stamp(p, changed.get(p.id, p), counter) for p in before.pipelines),
        cordoned=before.cordoned if cordoned is None else tuple(sorted(set(cordoned))),
        retired=before.retired if retired is None else tuple(sorted(set(retired))),
        paused=before.paused if paused is None else paused,
    )


def _stamp(before: Pipeline, after: Pipeline, counter: int) -> Pipeline:
    if after is before:  # nothing of what did not change is copied, and the same object says so
        return before
    same = [s.ranks for s in before.stages] == [s.ranks for s in after.stages]
    return replace(after, epoch=before.epoch if same else counter)


def interned(before: Topology | None, after: Topology) -> Topology:
    """`after`, with the objects of `before` for every pipeline that is the same: so that what changed can be told by
    identity, also of a value that came from etcd."""
    known = {} if before is None else {p.id: p for p in before.pipelines}
    pipelines = tuple(
        old if (old := known.get(p.id)) == p and old is not None else p for p in after.pipelines
    )
    return replace(after, pipelines=pipelines)
