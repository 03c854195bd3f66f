"""Checks and plans of operations that are not about one node: transfer-leader, pause, resume, restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from controlplane.contract.records import OperationKind, ProcessKind, RestartScope, Target
from controlplane.contract.status import Check, OperationRequest
from controlplane.contract.topology import Mode, Pipeline
from controlplane.core import restart
from controlplane.core.placement import takers
from controlplane.core.policy import Situation


def heir(request: OperationRequest, s: Situation) -> str:
    """The controller that is to lead: the one that is named, else the next in line."""
    return request.node or next(iter(s.policy.peers.candidates[1:]), "")


def targets(request: OperationRequest, s: Situation) -> tuple[Target, ...]:
    if request.node not in set(RestartScope):
        return ()
    return restart.targets(s, RestartScope(request.node))


def checks(request: OperationRequest, kind: OperationKind, s: Situation) -> Iterator[Check]:
    match kind:
        case OperationKind.TRANSFER:
            yield _transfer(request, s)
        case OperationKind.PAUSE:
            yield from _pause(s)
        case OperationKind.RESUME:
            paused = s.topology.paused
            message = "automation is paused" if paused else "automation is not paused: nothing to do"
            yield Check("ok" if paused else "warn", "paused", message)
        case OperationKind.RESTART:
            yield from _restart(request, s)
        case _:
            raise AssertionError(f"{kind} is about a node")


def _transfer(request: OperationRequest, s: Situation) -> Check:
    to, candidates = heir(request, s), s.policy.peers.candidates
    if len(candidates) < 2:
        return Check("fail", "candidates", "there is no second candidate that could lead")
    if to not in candidates:
        return Check("fail", "candidates", f"{to} is none of the candidates: {', '.join(candidates)}")
    if to == candidates[0]:
        return Check("warn", "candidates", f"{to} leads already: nothing to do")
    return Check("ok", "candidates", f"{to} is ready to lead after {candidates[0]}")


def _pause(s: Situation) -> Iterator[Check]:
    if s.topology.paused:
        yield Check("warn", "paused", "automation is paused already: nothing to do")
        return
    yield Check(
        "warn", "repair", "while paused a node that dies is not replaced: its streams wait, then fail"
    )
    for pipeline in s.topology.pipelines:
        if pipeline.move is not None:
            move = pipeline.move
            yield Check(
                "warn", "moves", f"the move of {pipeline.id}/{move.stage} to {move.to.node} is called off"
            )


def _restart(request: OperationRequest, s: Situation) -> Iterator[Check]:
    found = targets(request, s)
    if request.node not in set(RestartScope):
        yield Check("fail", "scope", f"{request.node!r} is none of {', '.join(RestartScope)}")
        return
    if not found:
        yield Check("fail", "scope", f"no process of {request.node} is registered")
        return
    kinds = [target.kind for target in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind.value}s" for kind in ProcessKind if kind in kinds)
    yield Check("ok", "processes", f"{counts}, one after the other")
    if s.topology.paused:
        yield Check("warn", "paused", "automation is paused: nothing moves until it is resumed")
    if s.topology.mode is Mode.STOP_RESTART and ProcessKind.NODE in kinds:
        yield Check("fail", "mode", "mode stop-restart moves nothing")
    if kinds.count(ProcessKind.CONTROLLER) == 1:
        yield Check("warn", "leader", "nobody leads while the only controller restarts")
    if kinds.count(ProcessKind.GATEWAY) == 1:
        yield Check("warn", "gateways", "clients of the only gateway have to connect again")
    yield from _stages(s, [target.member.node for target in found if target.kind is ProcessKind.NODE])


def _stages(s: Situation, nodes: list[str]) -> Iterator[Check]:
    """Whether each node could be emptied, were it alone avoided. Who is only suspected may be well by then."""
    stuck: list[str] = []
    later: list[str] = []
    for node in nodes:
        alone = replace(s, avoid=s.avoid | {node})
        for name, index in s.topology.serving(node):
            pipeline = s.topology.pipeline(name)
            if pipeline is None or takers(alone, pipeline, index, keep_kv=False):
                continue
            (later if _could_serve(alone, pipeline, index) else stuck).append(f"{node} ({name}/{index})")
    if stuck:
        yield Check("fail", "stages", f"nobody else can serve what these do: {', '.join(stuck)}")
    elif later:
        yield Check(
            "warn", "stages", f"nobody could take over just now, and they would wait: {', '.join(later)}"
        )
    elif nodes:
        yield Check("ok", "stages", "each node's duties can be taken over while it restarts")


def _could_serve(s: Situation, pipeline: Pipeline, stage: int) -> bool:
    inside = {member.node for member in pipeline.members()}
    return any(
        view.registered and view.record.stage == stage and not s.nodes.is_dead(view.member)
        for node, view in s.nodes.views.items()
        if node not in inside and node not in s.avoid
    )


def plan(request: OperationRequest, kind: OperationKind, s: Situation) -> Iterator[str]:
    match kind:
        case OperationKind.TRANSFER:
            yield f"{next(iter(s.policy.peers.candidates), 'the leader')} resigns"
            yield f"{heir(request, s) or 'nobody'} leads"
        case OperationKind.PAUSE:
            yield "call moves off"
            yield "plan nothing more"
        case OperationKind.RESUME:
            yield "plan again: dead nodes are replaced, operations go on"
        case _:
            for target in targets(request, s):
                name = target.member.node
                match target.kind:
                    case ProcessKind.NODE:
                        duties = ", ".join(f"{p}/{i}" for p, i in s.topology.serving(name))
                        yield (
                            f"move {duties} off {name}, restart it, hand back"
                            if duties
                            else f"restart {name}"
                        )
                    case ProcessKind.CONTROLLER if target.member.node in s.policy.peers.candidates[:1]:
                        yield f"transfer leadership, restart {name}"
                    case _:
                        yield f"restart {name}"
