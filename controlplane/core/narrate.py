"""The cluster's history, told from what changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from controlplane.contract.events import Event, EventKind
from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationState
from controlplane.contract.reports import RecoveryReport
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Pipeline, Topology, switched
from controlplane.core import kinds
from controlplane.core.detector import Verdict


def of_verdict(verdict: Verdict, unix_now: float) -> Event:
    """A node's state changed. `silent_s` of a death is the time since its last sign of life: an upper bound."""
    kind, text = EventKind.SUSPECTED, f"suspected: {verdict.evidence}"
    if verdict.after is NodeState.RED:
        kind = EventKind.LEFT if verdict.left else EventKind.DIED
        text = "left" if verdict.left else f"died: {verdict.evidence}"
    elif verdict.before is NodeState.RED:
        kind, text = EventKind.CLEARED, "is heard again, as a blank node"
        text += f", {verdict.evidence}" if verdict.evidence else ""
    elif verdict.after is NodeState.GREEN:
        kind, text = EventKind.CLEARED, "is heard again"
    details: dict[str, float | int | str] = {
        "incarnation": verdict.member.incarnation,
        "evidence": verdict.evidence,
        "silent_s": round(verdict.silent_s, 4),
    }
    return Event(kind, verdict.member.node, f"{verdict.member.node} {text}", unix_now, details=details)


def of_blemish(text: str, unix_now: float) -> Event:
    """`text`: "rule or invariant: where, and what"."""
    _, _, problem = text.partition(": ")
    where = problem.split(":")[0].split("/")[0]
    return Event(EventKind.BLEMISH, where, text, unix_now)


def of_topology(
    before: Topology, after: Topology, died_s: Mapping[Member, float], unix_now: float
) -> Iterator[Event]:
    """What a written topology changed. `died_s`: how long ago each dead member was found dead."""
    known = {p.id: p for p in before.pipelines}
    for gone in known.keys() - {p.id for p in after.pipelines}:
        yield Event(EventKind.SCALED, gone, f"{gone} is gone: it had no stream left", unix_now, after.counter)
    for new in after.pipelines:
        old = known.get(new.id)
        if old is new:
            continue
        if old is None:
            homes = _homes(new)
            yield Event(EventKind.SCALED, new.id, f"{new.id} is new, with {homes}", unix_now, after.counter)
            continue
        if old.closing != new.closing:
            text = "takes no new request: it is to go" if new.closing else "stays, and takes requests again"
            yield Event(EventKind.SCALED, new.id, f"{new.id} {text}", unix_now, after.counter)
        if old.epoch != new.epoch:
            yield from _epoch(old, new, died_s, unix_now)
        if old.move != new.move:
            yield from _move(old, new, unix_now)


def _homes(pipeline: Pipeline) -> str:
    return ", ".join(home for stage in pipeline.stages for home in stage.homes)


def _epoch(old: Pipeline, new: Pipeline, died_s: Mapping[Member, float], unix_now: float) -> Iterator[Event]:
    parts: list[str] = []
    died: list[str] = []
    details: dict[str, float | int | str] = {}
    for index, (was, now) in enumerate(zip(old.stages, new.stages, strict=True)):
        if was.ranks == now.ranks:
            continue
        parts.append(f"stage {index}: {_names(was.ranks)} -> {_names(now.ranks)}")
        for member in was.ranks:
            if member in died_s and member not in now.ranks:
                # From the death being known to the new topology being written.
                details["plan_s"] = round(max(died_s[member], float(details.get("plan_s", 0.0))), 4)
                died.append(str(member))
    if died:
        details["died"] = ", ".join(died)
    yield Event(EventKind.EPOCH, new.id, f"{new.id}: {'; '.join(parts)}", unix_now, new.epoch, details)
    empty = [i for i, stage in enumerate(new.stages) if not stage.ranks]
    if empty and old.up:
        text = f"{new.id} is down: no node is left for stage {', '.join(map(str, empty))}"
        yield Event(EventKind.UNAVAILABLE, new.id, text, unix_now, new.epoch)


def _names(members: tuple[Member, ...]) -> str:
    return "+".join(m.node for m in members) or "nobody"


def _move(old: Pipeline, new: Pipeline, unix_now: float) -> Iterator[Event]:
    was, now = old.move, new.move
    move = now or was
    if move is None or (was is not None and now is not None):
        return
    place = f"{new.id}/{move.stage} to {move.to.node}"
    if was is None:
        text = f"moving {place}"
    else:
        text = f"moved {place}" if switched(old, new) else f"called off: {place}"
    details: dict[str, float | int | str] = {"reason": move.reason}
    yield Event(EventKind.MOVE, new.id, text, unix_now, new.epoch, details)


def of_recovery(report: RecoveryReport, node: str, unix_now: float) -> Event:
    """Phases as the scheduler timed them; each counts from the one before."""
    details: dict[str, float | int | str] = {
        "connect_s": round(report.connected_unix_s - report.seen_unix_s, 4),
        "restore_s": round(report.restored_unix_s - report.connected_unix_s, 4),
        "requests": report.requests,
        "tokens_recomputed": report.tokens_recomputed,
        "planned": int(report.planned),
        "scheduler": node,
        "seen_unix_s": report.seen_unix_s,
    }
    if report.first_token_unix_s:
        details["first_token_s"] = round(report.first_token_unix_s - report.restored_unix_s, 4)
    last = max(report.first_token_unix_s, report.restored_unix_s)
    text = (
        f"{report.pipeline} serves again after {last - report.seen_unix_s:.3f} s ({report.requests} requests)"
    )
    return Event(EventKind.RECOVERED, report.pipeline, text, unix_now, report.epoch, details)


def of_operation(op: Operation, unix_now: float) -> Event:
    kind = kinds.of(op).done_event if op.state is OperationState.DONE else EventKind.OPERATION
    details: dict[str, float | int | str] = {
        "operation": op.id,
        "kind": op.kind.value,
        "state": op.state.value,
    }
    if op.finished_unix_s and op.created_unix_s:
        details["took_s"] = round(op.finished_unix_s - op.created_unix_s, 4)
    subject = op.id if kind is EventKind.OPERATION else op.node
    what = f"{op.kind.value} {op.node or op.instances or ''}".strip()
    return Event(kind, subject, f"{what}: {op.message}", unix_now, details=details)
