"""The cluster's status as this controller sees it."""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation
from controlplane.contract.reports import NO_LINK, NodeReport
from controlplane.contract.status import (
    ClusterStatus,
    NodeState,
    NodeStatus,
    PipelineState,
    PipelineStatus,
    StageStatus,
)
from controlplane.contract.topology import Pipeline, Topology
from controlplane.core.membership import Membership, Nodes

OPERATIONS_SHOWN = 50  # open ones, and the newest of the others


def cluster_status(
    config: ClusterConfig,
    me: str,
    members: Membership,
    topology: Topology | None,
    nodes: Nodes,
    operations: Mapping[str, Operation],
    now: float,
) -> ClusterStatus:
    pipelines = () if topology is None else topology.pipelines
    serving: dict[NodeId, list[str]] = {}
    for pipeline in pipelines:
        for index, stage in enumerate(pipeline.stages):
            for node in {member.node for member in stage.ranks}:
                serving.setdefault(node, []).append(f"{pipeline.id}/{index}")
    newest = sorted(operations.values(), key=lambda o: (not o.open, -o.created_unix_s, o.id))
    return ClusterStatus(
        cluster=config.cluster,
        group=config.group,
        model=config.model_name,
        mode=config.mode if topology is None else topology.mode,
        available=any(_serves(p, nodes) for p in pipelines),
        counter=0 if topology is None else topology.counter,
        paused=topology is not None and topology.paused,
        leader="",
        answered_by=me,
        etcd_age_s=0.0,
        nodes=tuple(
            _node(node, members, nodes, topology, tuple(serving.get(node, ())), now)
            for node in _names(nodes, topology)
        ),
        pipelines=tuple(_pipeline(p, nodes) for p in pipelines),
        controllers=(),
        gateways=(),
        operations=tuple(newest[:OPERATIONS_SHOWN]),
    )


def _names(nodes: Nodes, topology: Topology | None) -> list[NodeId]:
    """n2 before n10."""
    names = set(nodes.views)
    if topology is not None:
        names.update(home for p in topology.pipelines for stage in p.stages for home in stage.homes)
    return sorted(names, key=lambda name: (len(name), name))


def _node(
    node: NodeId,
    members: Membership,
    nodes: Nodes,
    topology: Topology | None,
    serving: tuple[str, ...],
    now: float,
) -> NodeStatus:
    view = nodes.views.get(node)
    cordoned = topology is not None and node in topology.cordoned
    if view is None:
        return NodeStatus(
            node=node,
            state=NodeState.ABSENT,
            evidence="never registered",
            serving=serving,
            cordoned=cordoned,
        )
    report = nodes.reports.get(view.member)
    record = view.record
    return NodeStatus(
        node=node,
        state=view.state,
        incarnation=record.member.incarnation,
        evidence=members.detector.evidence(view.member) or view.why_not,
        stage=record.stage,
        serving=serving,
        cordoned=cordoned,
        link_address=record.link_address,
        rpc_address=record.rpc_address,
        pid=record.pid,
        version=record.version,
        settings=record.settings,
        numerics=record.numerics,
        troubles=() if report is None else _troubles(report),
        silent_s=round(members.detector.silent_s(view.member, now), 3),
        slowness=round(members.detector.conduct.slowness(view.member), 2),
        progress=0 if report is None else report.progress,
        blocks_used=0 if report is None else report.blocks_used,
        blocks_replica=0 if report is None else report.blocks_replica,
        blocks_total=record.pool_blocks if report is None else report.blocks_total,
        fault_domain=record.fault_domain,
        counters={} if report is None else report.counters,
    )


def _troubles(report: NodeReport) -> tuple[str, ...]:
    """What a node says itself, and links that cannot be opened whatever happens."""
    links = (f"{link.reason} ({link.peer.node})" for link in report.links if link.reason.startswith(NO_LINK))
    return (*report.troubles, *links)


def _pipeline(pipeline: Pipeline, nodes: Nodes) -> PipelineStatus:
    stages = tuple(_stage(pipeline, index, nodes) for index in range(len(pipeline.stages)))
    views = [nodes.views.get(m.node) for m in pipeline.members()]
    if not _serves(pipeline, nodes):
        state = PipelineState.FORMING if pipeline.epoch == 0 else PipelineState.DOWN
    elif pipeline.move is not None:
        state = PipelineState.MOVING
    elif any(s.borrowed for s in stages) or any(v is None or v.state is not NodeState.GREEN for v in views):
        state = PipelineState.DEGRADED
    else:
        state = PipelineState.UP
    return PipelineStatus(
        id=pipeline.id,
        state=state,
        epoch=pipeline.epoch,
        stages=stages,
        running=nodes.load(pipeline),
        waiting=nodes.queued(pipeline),
        move=pipeline.move,
    )


def _serves(pipeline: Pipeline, nodes: Nodes) -> bool:
    """Somebody is named for every stage and lives: while automation is paused the dead stay named."""
    return pipeline.up and not any(nodes.is_dead(member) for member in pipeline.members())


def _stage(pipeline: Pipeline, index: int, nodes: Nodes) -> StageStatus:
    stage = pipeline.stages[index]
    lags = [nodes.lag(pipeline, index, target) for target in stage.replicas]
    known = [lag for lag in lags if lag is not None]
    return StageStatus(
        homes=stage.homes,
        serving=stage.ranks,
        borrowed=any(m.node not in stage.homes for m in stage.ranks),
        replicas=stage.replicas,
        lag_tokens=max(known) if known and len(known) == len(lags) else -1,
    )
