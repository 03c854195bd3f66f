"""What the loss of each node would cost now: a what-if over the status (pure).

It follows what repair and recovery do (repair.py, dataplane/core/recovery.py): somebody else who has the stage takes
over, best with a copy; each request goes on at the least that any stage has, and computes the rest again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import NodeId
from controlplane.contract.incidents import Incident
from controlplane.contract.protection import Loss, Protection
from controlplane.contract.repair import Computing, Restoring, computed_again, middle, repair_s
from controlplane.contract.status import ClusterStatus, NodeState, NodeStatus, PipelineState, PipelineStatus
from controlplane.contract.topology import Mode

SERVING = (PipelineState.UP, PipelineState.DEGRADED, PipelineState.MOVING)


def protection(status: ClusterStatus, config: ClusterConfig, incidents: Sequence[Incident]) -> Protection:
    """`incidents`: those of late, to tell how long it takes to find a failure and to connect anew."""
    nodes = {node.node: node for node in status.nodes}
    size = config.engine.block_size
    kv_bytes = protected = lag = tails = 0
    for pipeline in status.pipelines:
        for index, stage in enumerate(pipeline.stages):
            token_bytes = _block_bytes(nodes, pipeline, index) / size
            kv_bytes += int(pipeline.tokens * token_bytes)
            if pipeline.unheld_tokens >= 0:
                safe = max(0, pipeline.tokens - pipeline.tail_tokens - pipeline.unheld_tokens)
                protected += int(safe * token_bytes)
                lag += pipeline.unheld_tokens
            elif stage.lag_tokens >= 0:
                safe = max(0, pipeline.tokens - pipeline.tail_tokens - stage.lag_tokens)
                protected += int(safe * token_bytes)
                lag += stage.lag_tokens
            tails += pipeline.tail_tokens
    overheads = _overheads(incidents)
    overhead_s = median(overheads) if overheads else None
    served = _served(status)
    restoring = _restoring(status.nodes)
    group = _Group(status)
    losses = [
        _loss(node, served.get(node.node, {}), group, config, overhead_s, restoring) for node in status.nodes
    ]
    return Protection(
        group=status.group,
        mode=status.mode,
        policy=_policy(config, status.mode),
        kv_bytes=kv_bytes,
        protected_bytes=protected,
        spent_bytes=sum(_held_for_others(node) for node in status.nodes),
        lag_tokens=lag,
        tail_tokens=tails,
        overhead_s=overhead_s,
        measured=len(overheads),
        losses=tuple(losses),
        restoring=restoring,
    )


class _Group:
    """What is the same whichever node is lost."""

    def __init__(self, status: ClusterStatus) -> None:
        self.mode = status.mode
        self.nodes = {node.node: node for node in status.nodes}
        self.pipelines = {p.id: p for p in status.pipelines}
        self._serving = sum(p.state in SERVING for p in status.pipelines)
        self._able = Counter(n.stage for n in status.nodes if _may_serve(self.nodes, n.node, ""))

    def serves_without(self, pipeline: PipelineStatus) -> bool:
        """Whether another instance serves."""
        return self._serving > (pipeline.state in SERVING)

    def has_without(self, stage: int, lost: NodeStatus) -> bool:
        """Whether another node could serve a stage."""
        own = lost.stage == stage and _may_serve(self.nodes, lost.node, "")
        return self._able[stage] > own


def _policy(config: ClusterConfig, mode: Mode) -> str:
    match mode:
        case Mode.PARITY:
            return f"{config.parity.code} {config.stages}+{config.parity.parities}"
        case Mode.NONE | Mode.STOP_RESTART:
            return "none"
        case Mode.LOAD_AWARE | Mode.FIXED_NEIGHBOUR:
            return "one copy of each request, where its scheduler chooses"
        case _:
            return "one copy"


def _served(status: ClusterStatus) -> dict[NodeId, dict[str, list[int]]]:
    """Of each node the pipelines that it serves, and which stages of them."""
    found: dict[NodeId, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for pipeline in status.pipelines:
        for index, stage in enumerate(pipeline.stages):
            for member in stage.serving:
                found[member.node][pipeline.id].append(index)
    return found


def _overheads(incidents: Iterable[Incident]) -> list[float]:
    """Seconds from the failure until its pipeline's stages answered in the new epoch."""
    found = []
    for incident in incidents:
        one = incident.slowest
        if one is not None and one.plan_s is not None and one.connect_s is not None:
            found.append(incident.detect_s + one.plan_s + one.connect_s)
    return found


def _restoring(nodes: Iterable[NodeStatus]) -> Restoring:
    """How fast a node will have blocks restored that has not had any yet: as others had."""
    found = [node.restoring for node in nodes if node.restoring.block_s]
    if not found:
        return Restoring()
    return Restoring(
        middle((one.wait_s, one.blocks) for one in found),
        middle((one.block_s, one.blocks) for one in found),
        sum(one.blocks for one in found),
    )


def _loss(
    node: NodeStatus,
    served: Mapping[str, Sequence[int]],
    group: _Group,
    config: ClusterConfig,
    overhead_s: float | None,
    restoring: Restoring,
) -> Loss:
    streams = tokens = restore_bytes = 0
    wait_s: float | None = 0.0
    how, down = [], []
    for name, stages in served.items():
        pipeline = group.pipelines[name]
        streams += pipeline.running
        if pipeline.unheld_tokens >= 0 and group.serves_without(pipeline):
            # The instance fails as a whole, and nothing is borrowed.
            again = pipeline.unheld_tokens + pipeline.tail_tokens
            told = "its requests go on at the instances that hold their copies, or have the least to do"
        elif not all(group.has_without(stage, node) for stage in stages):
            down.append(pipeline.id)
            how.append(f"{pipeline.id}: down until {node.node} is back, then all of it is computed again")
            tokens += pipeline.tokens
            wait_s = None
            continue
        else:
            again, told = _again(pipeline, stages, group.nodes, node.node, group.mode, config)
        computing, blocks = _computing(pipeline), 0
        if group.mode is Mode.PARITY and again < pipeline.tokens:
            blocks = (pipeline.tokens - again) // config.engine.block_size
            if computed_again({0: blocks}, config.engine.block_size, computing, restoring):
                again, blocks, told = pipeline.tokens, 0, "computed again, which is sooner than to restore it"
            restore_bytes += sum(blocks * _block_bytes(group.nodes, pipeline, stage) for stage in stages)
        tokens += again
        how.append(f"{pipeline.id}: {told}")
        took_s = repair_s(again, blocks, computing, restoring)
        if wait_s is not None and pipeline.running:
            wait_s = None if took_s is None or overhead_s is None else max(wait_s, overhead_s + took_s)
    return Loss(
        node=node.node,
        serves=node.serving,
        streams=streams,
        tokens=tokens,
        restore_bytes=restore_bytes,
        wait_s=wait_s,
        how=tuple(how),
        down=tuple(down),
        exposed_bytes=_held_for_others(node),
    )


def _again(
    pipeline: PipelineStatus,
    stages: Sequence[int],
    nodes: Mapping[NodeId, NodeStatus],
    lost: NodeId,
    mode: Mode,
    config: ClusterConfig,
) -> tuple[int, str]:
    """Positions to be computed again if `lost` takes these stages with it, and what is gone on from, in words."""
    worst, told = 0, []
    if mode is Mode.PARITY and len(stages) > config.parity.parities:
        return pipeline.tokens, f"{len(stages)} stages at once are more than parity can bring back"
    for index in stages:
        stage = pipeline.stages[index]
        holders = [member.node for member in stage.replicas if _may_serve(nodes, member.node, lost)]
        if mode is Mode.PARITY and stage.lag_tokens >= 0:
            told.append("restored from parity")
        elif holders and stage.lag_tokens >= 0:
            told.append(f"goes on from the copy on {holders[0]}")
        else:
            return pipeline.tokens, "all of it is computed again: it has no copy and no parity"
        worst = max(worst, stage.lag_tokens)
    return min(pipeline.tokens, worst + pipeline.tail_tokens), ", ".join(dict.fromkeys(told))


def _computing(pipeline: PipelineStatus) -> Computing:
    return Computing(pipeline.step_s, pipeline.token_s, pipeline.pace_s, pipeline.chunk_tokens)


def _may_serve(nodes: Mapping[NodeId, NodeStatus], name: NodeId, lost: NodeId) -> bool:
    node = nodes.get(name)
    return name != lost and node is not None and node.state is NodeState.GREEN and not node.cordoned


def _block_bytes(nodes: Mapping[NodeId, NodeStatus], pipeline: PipelineStatus, stage: int) -> int:
    serving = pipeline.stages[stage].serving
    node = nodes.get(serving[0].node) if serving else None
    return node.block_bytes if node is not None else 0


def _held_for_others(node: NodeStatus) -> int:
    return node.blocks_replica * node.block_bytes + node.counters.get("parity_bytes", 0)
