"""Checks before an operation begins, and its plan in words. A `fail` refuses it and nothing has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace as judged

from msgspec.structs import replace

from controlplane.contract.ids import NodeId
from controlplane.contract.records import GROUP_WIDE, Operation, OperationKind
from controlplane.contract.status import Check, OperationAnswer, OperationRequest
from controlplane.contract.topology import Mode
from controlplane.core import preflight_group
from controlplane.core.drain import home_stages
from controlplane.core.operations import claims
from controlplane.core.placement import takers
from controlplane.core.policy import Situation

CAPACITY_WARN = 0.85
Place = tuple[str, int]  # pipeline, stage


def preflight(
    request: OperationRequest, s: Situation | None, operations: Mapping[str, Operation], unix_now: float
) -> OperationAnswer:
    """Pure: the caller writes `operation`, if it is accepted and no such id exists yet."""
    known = operations.get(request.id)
    if known is not None:
        same = request.is_for(known)
        said = (
            "was accepted before" if same else f"is the id of another operation ({known.kind} {known.node})"
        )
        check = Check("ok" if same else "fail", "id", f"{request.id} {said}")
        return OperationAnswer(same and not request.dry_run, (check,), (), known if same else None)
    if request.kind not in set(OperationKind):
        return _refused(f"{request.kind!r} is none of {', '.join(OperationKind)}")
    if s is None:
        return _refused("there is no topology yet")
    kind = OperationKind(request.kind)
    operation = _operation(request, kind, s, unix_now)
    checks = [
        Check("fail", "operations", f"{op.kind.value} {op.node}".strip() + f" is under way: {op.id}")
        for op in operations.values()
        if op.open and claims(op) & claims(operation)
    ]
    if kind in GROUP_WIDE or kind is OperationKind.RESTART:
        checks += preflight_group.checks(request, kind, s)
        plan = tuple(preflight_group.plan(request, kind, s))
    else:
        # Judge as if the operation ran: the node is avoided.
        s = judged(s, avoid=s.avoid | {request.node})
        checks += _checks(request, kind, s)
        plan = tuple(_plan(request, kind, s))
    accepted = not request.dry_run and all(check.level != "fail" for check in checks)
    return OperationAnswer(accepted, tuple(checks), plan, operation if accepted else None)


def _refused(why: str) -> OperationAnswer:
    return OperationAnswer(False, (Check("fail", "request", why),), ())


def _operation(request: OperationRequest, kind: OperationKind, s: Situation, unix_now: float) -> Operation:
    operation = Operation(
        id=request.id,
        kind=kind,
        node=request.node,
        substitute=request.substitute,
        created_unix_s=unix_now,
        deadline_unix_s=unix_now + request.deadline_s if request.deadline_s > 0 else 0.0,
    )
    view = s.nodes.views.get(request.node)
    match kind:
        case OperationKind.REPLACE if request.substitute is None and view is not None:
            return replace(operation, incarnation=view.member.incarnation)
        case OperationKind.TRANSFER:
            return replace(operation, node=preflight_group.heir(request, s))
        case OperationKind.RESTART:
            found = preflight_group.targets(request, s)
            return replace(operation, targets=found, version=request.version, settings=request.settings)
        case _:
            return operation


def _checks(request: OperationRequest, kind: OperationKind, s: Situation) -> Iterator[Check]:
    node = request.node
    if node not in s.nodes.views and not s.topology.serving(node) and not home_stages(s.topology, node):
        yield Check("fail", "node", f"there is no node {node}")
        return
    if s.topology.paused:
        yield Check("warn", "paused", "automation is paused: nothing moves until it is resumed")
    if kind is OperationKind.UNDRAIN:
        if request.substitute is not None:
            yield Check("fail", "substitute", "undrain takes no substitute")
        cordoned = node in s.topology.cordoned
        message = f"{node} is cordoned" if cordoned else f"{node} is not cordoned: nothing to do"
        yield Check("ok" if cordoned else "warn", "cordon", message)
        return
    if kind is OperationKind.CORDON:
        if node in s.topology.cordoned:
            yield Check("warn", "cordon", f"{node} is cordoned already: nothing to do")
        yield from _peers(node, s)
        return
    if s.topology.mode is Mode.STOP_RESTART:
        yield Check("fail", "mode", "mode stop-restart moves nothing")
        return
    if request.substitute is not None:
        yield from _substitute(request.substitute, kind, node, s)
    for place in s.topology.serving(node):
        yield from _takeover(place, request, s)
    yield from _peers(node, s)


def _substitute(substitute: NodeId, kind: OperationKind, node: NodeId, s: Situation) -> Iterator[Check]:
    view, old = s.nodes.views.get(substitute), s.nodes.views.get(node)
    stages = {index for _, index, _ in home_stages(s.topology, node)} or {old.record.stage if old else -1}
    if kind is not OperationKind.REPLACE:
        yield Check("fail", "substitute", f"{kind} takes no substitute")
    elif view is None or not view.usable:
        why = "it never registered" if view is None else view.why_not
        yield Check("fail", "substitute", f"{substitute} cannot serve: {why}")
    elif substitute in s.avoid or view.member in s.topology.retired:
        yield Check("fail", "substitute", f"{substitute} is cordoned, or is {node} itself")
    elif home_stages(s.topology, substitute):
        yield Check("fail", "substitute", f"{substitute} has a home of its own")
    elif stages != {view.record.stage}:
        yield Check(
            "fail", "substitute", f"{substitute} holds stage {view.record.stage}, not {sorted(stages)}"
        )
    else:
        yield Check("ok", "substitute", f"{substitute} is ready and holds the same weights")


def _taker(place: Place, request: OperationRequest, s: Situation) -> NodeId | None:
    pipeline = s.topology.pipeline(place[0])
    if pipeline is None:
        return None
    able = [m.node for m in takers(s, pipeline, place[1], keep_kv=False)]
    at_home = request.node in pipeline.stages[place[1]].homes
    if request.substitute is not None and at_home:
        able = [node for node in able if node == request.substitute]
    return able[0] if able else None


def _takeover(place: Place, request: OperationRequest, s: Situation) -> Iterator[Check]:
    name, index = place
    node, pipeline, to = request.node, s.topology.pipeline(place[0]), _taker(place, request, s)
    if pipeline is None:
        return
    if to is None:
        yield Check("fail", "stage", f"{node} serves {name}/{index} and no other node can take it over")
        return
    level = "ok" if to == request.substitute else "warn"
    of = len(pipeline.stages)
    yield Check(level, "stage", f"{node} holds stage {index} of {of} for {name}; {to} takes over")
    yield from _capacity(node, to, s)
    member = s.nodes.usable(to)
    lag = None if member is None else s.nodes.lag(pipeline, index, member)
    running = s.nodes.load(pipeline)
    if s.topology.mode is Mode.NONE:
        yield Check("warn", "replicas", f"mode none: {running} streams of {name} are computed again")
    elif not s.nodes.exchange(pipeline.stages[index].leader, member):
        yield Check(
            "warn", "replicas", f"{to} has other numerics: {running} streams of {name} are computed again"
        )
    elif lag is None:
        yield Check("ok", "replicas", f"{to} has no copy yet: {running} streams of {name} are copied first")
    else:
        yield Check("ok", "replicas", f"{to} is {lag} tokens behind on {running} streams of {name}")


def _capacity(node: NodeId, to: NodeId, s: Situation) -> Iterator[Check]:
    """The taker's own blocks and those of the node, replicas aside: these make room when it is needed."""
    views = s.nodes.views
    here = s.nodes.reports.get(views[node].member) if node in views else None
    there = s.nodes.reports.get(views[to].member)
    if here is None or there is None or there.blocks_total <= 0:
        yield Check("warn", "capacity", f"how full {node} and {to} are is not known")
        return
    used = here.blocks_used + there.blocks_used
    share = used / there.blocks_total
    level = "ok" if share <= CAPACITY_WARN else "warn" if share <= 1.0 else "fail"
    yield Check(level, "capacity", f"KV on {to} after it {share:.0%} (limit {CAPACITY_WARN:.0%})")


def _peers(node: NodeId, s: Situation) -> Iterator[Check]:
    stages = {index for _, index in s.topology.serving(node)}
    stages |= {index for _, index, _ in home_stages(s.topology, node)}
    for stage in sorted(stages):
        left = [
            n for n, v in s.nodes.views.items() if v.usable and v.record.stage == stage and n not in s.avoid
        ]
        if len(left) == 1:
            yield Check("warn", "peers", f"stage {stage} then hangs on {left[0]} alone")
        elif left:
            yield Check("ok", "peers", f"stage {stage} is then held by {', '.join(left)}")


def _plan(request: OperationRequest, kind: OperationKind, s: Situation) -> Iterator[str]:
    node = request.node
    if kind is OperationKind.UNDRAIN:
        yield f"uncordon {node}"
        yield from (f"hand {p.id}/{index} back to {node}" for p, index, _ in home_stages(s.topology, node))
        return
    if kind is OperationKind.CORDON:
        yield f"cordon {node}: no new duty; what it serves stays"
        return
    if kind is OperationKind.DRAIN:
        yield f"cordon {node}"
    for place in s.topology.serving(node):
        pipeline = s.topology.pipeline(place[0])
        streams = 0 if pipeline is None else s.nodes.load(pipeline)
        to = _taker(place, request, s) or "nobody"
        copy = (
            f"copy {streams} streams of {place[0]}/{place[1]}, " if s.topology.mode is Mode.REPLICATE else ""
        )
        yield f"{copy}switch {place[0]}/{place[1]} to {to} (a new epoch)"
    if kind is OperationKind.DRAIN:
        yield f"{node} is empty and stays cordoned"
    elif request.substitute is not None:
        yield f"{request.substitute} becomes the home of what was {node}'s; {node} stays cordoned"
    else:
        yield f"retire the process of {node}; its launcher starts a fresh one"
        yield from (f"hand {p.id}/{index} back to {node}" for p, index, _ in home_stages(s.topology, node))
