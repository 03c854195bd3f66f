"""The cluster's status as this controller sees it.

From scratch a group of thousands would take a tenth of a second, in which nobody is heard. So a status is made in
pieces, and it says again what the last one said of nodes and pipelines that nothing was heard of since.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import NodeId, PipelineId
from controlplane.contract.records import Operation
from controlplane.contract.repair import Restoring
from controlplane.contract.reports import LAG_UNKNOWN, NodeReport, PipelineReport
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


class Overview:
    """Makes statuses: anew only of nodes that something was heard of, of their pipelines, and of who is not green."""

    def __init__(self, config: ClusterConfig, me: str, members: Membership) -> None:
        self._config = config
        self._me = me
        self._members = members
        self._newest = Nodes({})  # of the last call: an earlier one that is under way goes on with it
        self._topology: Topology | None = None
        self._version: object = None  # of `members`
        self._names: list[NodeId] = []
        self._serving: dict[NodeId, list[str]] = {}
        self._around: dict[NodeId, list[PipelineId]] = {}  # the pipelines that a node serves
        self._places: dict[PipelineId, Pipeline] = {}
        self._nodes: dict[NodeId, NodeStatus] = {}
        self._pipelines: dict[PipelineId, PipelineStatus] = {}
        self._unsteady: set[NodeId] = set()  # for how long they have been silent changes all the time
        self._stale_nodes: set[NodeId] = set()
        self._stale_pipelines: set[PipelineId] = set()

    def pieces(
        self, topology: Topology | None, nodes: Nodes, operations: Mapping[str, Operation], now: float
    ) -> Generator[None, None, ClusterStatus]:
        """The status as the generator's result. Between its pieces the caller may let others run, and make another one:
        what comes later is then of a later moment. A piece looks at one node or pipeline; but the first one sorts all
        names anew, if the topology, a registration or a death has changed them, and the last one takes a small step for
        each name."""
        self._newest = nodes
        self._index(topology)
        touched = self._members.touched()
        self._stale_nodes |= (touched | self._unsteady) & self._nodes.keys()
        for node in touched:
            self._stale_pipelines.update(self._around.get(node, ()))
        while self._stale_nodes:
            node = self._stale_nodes.pop()
            self._look(node, now)
            yield
        while self._stale_pipelines:
            pipeline = self._stale_pipelines.pop()
            self._pipelines[pipeline] = _pipeline(self._places[pipeline], self._newest)
            yield
        return self._whole(operations)

    def _whole(self, operations: Mapping[str, Operation]) -> ClusterStatus:
        topology = self._topology
        pipelines = tuple(self._pipelines[name] for name in self._places)
        newest = sorted(operations.values(), key=lambda o: (not o.open, -o.created_unix_s, o.id))
        return ClusterStatus(
            cluster=self._config.cluster,
            group=self._config.group,
            model=self._config.model_name,
            mode=self._config.mode if topology is None else topology.mode,
            available=any(p.state not in (PipelineState.FORMING, PipelineState.DOWN) for p in pipelines),
            counter=0 if topology is None else topology.counter,
            paused=topology is not None and topology.paused,
            leader="",
            answered_by=self._me,
            etcd_age_s=0.0,
            nodes=tuple(self._nodes[name] for name in self._names),
            pipelines=pipelines,
            controllers=(),
            gateways=(),
            operations=tuple(newest[:OPERATIONS_SHOWN]),
        )

    def _index(self, topology: Topology | None) -> None:
        """After a write of the topology, a registration, or a death, all is looked at."""
        if topology is self._topology and self._members.version == self._version:
            return
        if topology is not self._topology:
            self._topology = topology
            self._places = {} if topology is None else {p.id: p for p in topology.pipelines}
            self._serving, self._around = {}, {}
            for pipeline in self._places.values():
                for index, stage in enumerate(pipeline.stages):
                    for node in {member.node for member in stage.ranks}:
                        self._serving.setdefault(node, []).append(f"{pipeline.id}/{index}")
                        self._around.setdefault(node, []).append(pipeline.id)
        self._version = self._members.version
        self._names = _names(self._newest, topology)
        unknown = NodeStatus("", NodeState.ABSENT)
        self._nodes = {node: self._nodes.get(node, unknown) for node in self._names}
        self._unsteady &= self._nodes.keys()
        self._stale_nodes = set(self._names)
        self._pipelines = {name: p for name, p in self._pipelines.items() if name in self._places}
        self._stale_pipelines = set(self._places)

    def _look(self, node: NodeId, now: float) -> None:
        topology = self._topology
        serving = tuple(self._serving.get(node, ()))
        status = _node(node, self._members, self._newest, serving, now)
        if topology is not None and (node in topology.cordoned or node in topology.leaving):
            status = replace(status, cordoned=node in topology.cordoned, leaving=node in topology.leaving)
        self._nodes[node] = status
        if status.state is NodeState.GREEN:
            self._unsteady.discard(node)
        else:
            self._unsteady.add(node)


def _names(nodes: Nodes, topology: Topology | None) -> list[NodeId]:
    """n2 before n10."""
    names = set(nodes.views)
    if topology is not None:
        # Who was to leave, and has left, is missed by nobody.
        names -= {
            node
            for node in topology.leaving
            if node in nodes.views and nodes.is_dead(nodes.views[node].member)
        }
        names.update(m.node for p in topology.pipelines for m in p.members() if m.node in nodes.views)
        names.update(home for p in topology.pipelines for stage in p.stages for home in stage.homes)
    return sorted(names, key=lambda name: (len(name), name))


def _node(
    node: NodeId, members: Membership, nodes: Nodes, serving: tuple[str, ...], now: float
) -> NodeStatus:
    view = nodes.views.get(node)
    if view is None:
        evidence = "never registered"
        return NodeStatus(node, NodeState.ABSENT, evidence=evidence, serving=serving)
    record, detector = view.record, members.detector
    member = record.member
    report = nodes.reports.get(member)
    silent_s = detector.silent_s(member, now)
    return NodeStatus(
        node=node,
        state=view.state,
        incarnation=member.incarnation,
        evidence=detector.evidence(member) or view.why_not,
        stage=record.stage,
        serving=serving,
        link_address=record.link_address,
        rpc_address=record.rpc_address,
        pid=record.pid,
        version=record.version,
        settings=record.settings,
        numerics=record.numerics,
        troubles=() if report is None else _troubles(report),
        # Between two heartbeats everybody is silent.
        silent_s=0.0 if silent_s < members.config.timing.suspect_after_s else round(silent_s, 3),
        slowness=round(detector.conduct.slowness(member), 2),
        progress=0 if report is None else report.progress,
        blocks_used=0 if report is None else report.blocks_used,
        blocks_replica=0 if report is None else report.blocks_replica,
        blocks_total=record.pool_blocks if report is None else report.blocks_total,
        block_bytes=0 if report is None else report.block_bytes,
        fault_domain=record.fault_domain,
        counters={} if report is None else report.counters,
        restoring=Restoring() if report is None else report.restoring,
    )


def _troubles(report: NodeReport) -> tuple[str, ...]:
    """What a node says itself, and links that cannot be opened whatever happens."""
    links = (f"{link.reason} ({link.peer.node})" for link in report.links if link.refused)
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
    said = nodes.report(pipeline.leader_at(0), pipeline.id, 0) or PipelineReport(pipeline.id, 0, 0, -1)
    return PipelineStatus(
        id=pipeline.id,
        state=state,
        epoch=pipeline.epoch,
        stages=stages,
        running=said.running,
        waiting=said.waiting,
        move=pipeline.move,
        tokens=said.tokens,
        tail_tokens=said.tail_tokens,
        token_s=said.token_s,
        step_s=said.step_s,
        pace_s=said.pace_s,
        chunk_tokens=said.chunk_tokens,
        unheld_tokens=said.unheld_tokens,
        closing=pipeline.closing,
    )


def _serves(pipeline: Pipeline, nodes: Nodes) -> bool:
    """Somebody is named for every stage and lives: while automation is paused the dead stay named."""
    return pipeline.up and not any(nodes.is_dead(member) for member in pipeline.members())


def _stage(pipeline: Pipeline, index: int, nodes: Nodes) -> StageStatus:
    stage = pipeline.stages[index]
    lags = [nodes.lag(pipeline, index, target) for target in stage.replicas]
    known = [lag for lag in lags if lag is not None and lag < LAG_UNKNOWN]
    lag_tokens = max(known) if known and len(known) == len(lags) else -1
    said = nodes.report(stage.leader, pipeline.id, index)
    if said is not None and said.epoch == pipeline.epoch and said.uncoded_tokens >= 0:
        lag_tokens = said.uncoded_tokens
    return StageStatus(
        homes=stage.homes,
        serving=stage.ranks,
        borrowed=any(m.node not in stage.homes for m in stage.ranks),
        replicas=stage.replicas,
        lag_tokens=lag_tokens,
    )
