"""What changed from one status to the next, for dashboards: a few lines where the whole would be megabytes.

Everything that somebody acts on is told at once. Figures that change all the time (blocks, requests, lags, silences)
wait until `figures`; progress, and all counters but a few, are for /metrics and are left out.
"""

from __future__ import annotations

import msgspec

from controlplane.contract.status import ClusterStatus, NodeStatus, PipelineStatus

HEARD_S = 1.0  # a shorter silence is none
SHOWN_COUNTERS = ("ranks_lost",)
LISTS = ("nodes", "pipelines")
FIELDS = tuple(field for field in ClusterStatus.__struct_fields__ if field not in LISTS)


def shown(status: ClusterStatus, seen: tuple[ClusterStatus, ClusterStatus] | None = None) -> ClusterStatus:
    """The status without what no dashboard shows. `seen`: an earlier one, and what was shown of it; nodes that are the
    same objects in both are the same objects in what is shown."""
    known = {} if seen is None else {id(n): out for n, out in zip(seen[0].nodes, seen[1].nodes, strict=True)}
    nodes = tuple(known.get(id(node)) or _shown(node) for node in status.nodes)
    return msgspec.structs.replace(status, nodes=nodes)


def difference(before: ClusterStatus, after: ClusterStatus, figures: bool) -> ClusterStatus | None:
    """`after` as dashboards are to see it: with objects of `before` where nothing is told, so that `changed` can tell
    by identity. None: not the same nodes and pipelines, and the whole has to be sent."""
    if [n.node for n in before.nodes] != [n.node for n in after.nodes]:
        return None
    if [p.id for p in before.pipelines] != [p.id for p in after.pipelines]:
        return None
    nodes = tuple(
        old if old is new or old == new or (not figures and _calm_node(old, new) == old) else new
        for old, new in zip(before.nodes, after.nodes, strict=True)
    )
    pipelines = tuple(
        old if old is new or old == new or (not figures and _calm_pipeline(old, new) == old) else new
        for old, new in zip(before.pipelines, after.pipelines, strict=True)
    )
    return msgspec.structs.replace(after, nodes=nodes, pipelines=pipelines)


def changed(before: ClusterStatus, after: ClusterStatus, version: int) -> bytes:
    """JSON: {"from", "to", "fields": {name: value}, "nodes": [...], "pipelines": [...]}, of what `difference` gave."""
    fields = {f: getattr(after, f) for f in FIELDS if getattr(after, f) != getattr(before, f)}
    return msgspec.json.encode(
        {
            "from": version - 1,
            "to": version,
            "fields": fields,
            "nodes": [new for old, new in zip(before.nodes, after.nodes, strict=True) if new is not old],
            "pipelines": [
                p for old, p in zip(before.pipelines, after.pipelines, strict=True) if p is not old
            ],
        }
    )


def _shown(node: NodeStatus) -> NodeStatus:
    silent_s = float(int(node.silent_s)) if node.silent_s >= HEARD_S else 0.0
    counters = {name: node.counters[name] for name in SHOWN_COUNTERS if node.counters.get(name)}
    return msgspec.structs.replace(node, counters=counters, progress=0, silent_s=silent_s)


def _calm_node(old: NodeStatus, new: NodeStatus) -> NodeStatus:
    """The new one with the old one's figures."""
    return msgspec.structs.replace(
        new,
        silent_s=old.silent_s,
        slowness=old.slowness,
        blocks_used=old.blocks_used,
        blocks_replica=old.blocks_replica,
    )


def _calm_pipeline(old: PipelineStatus, new: PipelineStatus) -> PipelineStatus:
    stages = new.stages
    if len(old.stages) == len(stages):
        pairs = zip(old.stages, stages, strict=True)
        # That nothing protects a stage is no figure.
        stages = tuple(
            msgspec.structs.replace(now, lag_tokens=was.lag_tokens)
            if (was.lag_tokens < 0) == (now.lag_tokens < 0)
            else now
            for was, now in pairs
        )
    return msgspec.structs.replace(new, running=old.running, waiting=old.waiting, stages=stages)
