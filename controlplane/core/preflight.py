"""Whether an operation may begin. A `fail` refuses it and nothing has changed. What a kind checks is in kinds/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as judged

from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.status import Check, OperationAnswer, OperationRequest
from controlplane.core import kinds
from controlplane.core.policy import Situation


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
    operation = _operation(request, s, unix_now)
    kind = kinds.of(operation)
    checks = [
        Check("fail", "operations", f"{op.kind.value} {op.node}".strip() + f" is under way: {op.id}")
        for op in operations.values()
        if op.open and kinds.of(op).claims() & kind.claims()
    ]
    # Judge as if the operation ran.
    s = judged(s, avoid=s.avoid | kind.avoids())
    checks += kind.checks(s)
    plan = tuple(kind.plan(s))
    accepted = not request.dry_run and all(check.level != "fail" for check in checks)
    return OperationAnswer(accepted, tuple(checks), plan, operation if accepted else None)


def _refused(why: str) -> OperationAnswer:
    return OperationAnswer(False, (Check("fail", "request", why),), ())


def _operation(request: OperationRequest, s: Situation, unix_now: float) -> Operation:
    operation = Operation(
        id=request.id,
        kind=OperationKind(request.kind),
        node=request.node,
        substitute=request.substitute,
        created_unix_s=unix_now,
        deadline_unix_s=unix_now + request.deadline_s if request.deadline_s > 0 else 0.0,
    )
    return kinds.KINDS[operation.kind].declared(operation, request, s)
