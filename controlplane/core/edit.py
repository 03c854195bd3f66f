"""Making the next topology from this one. The counter and the epochs are stamped here and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology


def initial(config: ClusterConfig, counter: int) -> Topology:
    """Every pipeline with its homes, and nobody serving yet (epoch 0)."""
    homes = [[config.node_name(i, s) for s in range(config.stages)] for i in range(config.instances)]
    pipelines = tuple(unformed(f"p{i}", nodes) for i, nodes in enumerate(homes))
    return Topology(group=config.group, counter=counter, mode=config.mode, pipelines=pipelines)


def resumed(topology: Topology, counter: int) -> Topology:
    """What an etcd that was restored from a snapshot has, as the next topology: later ones, on which nodes have
    acted, are lost. Every pipeline begins a new epoch, so that nothing of those counts; moves are called off."""
    pipelines = tuple(replace(p, epoch=counter, move=None) for p in topology.pipelines)
    return replace(topology, counter=counter, pipelines=pipelines)


def unformed(name: PipelineId, homes: Iterable[NodeId]) -> Pipeline:
    """A pipeline that nobody serves yet, by the homes of its stages."""
    return Pipeline(id=name, epoch=0, stages=tuple(Stage(homes=(home,)) for home in homes))


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
    leaving: Iterable[NodeId] | None = None,
    added: Iterable[Pipeline] = (),
    removed: Collection[PipelineId] = (),
) -> Topology:
    """`before` with some pipelines (by id) and lists replaced: counter + 1, new epochs where ranks changed. `added`
    ones have epoch 0, and come last."""
    counter = before.counter + 1
    changed = {p.id: p for p in pipelines}
    return replace(
        before,
        counter=counter,
        mode=before.mode if mode is None else mode,
        pipelines=(
            *(_stamp(p, changed.get(p.id, p), counter) for p in before.pipelines if p.id not in removed),
            *added,
        ),
        cordoned=before.cordoned if cordoned is None else tuple(sorted(set(cordoned))),
        retired=before.retired if retired is None else tuple(sorted(set(retired))),
        paused=before.paused if paused is None else paused,
        leaving=before.leaving if leaving is None else tuple(sorted(set(leaving))),
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
