"""Verbs about one node: drain, cordon, uncordon, undrain, replace; and what all have in common that ask for something.

Each is declared to the cluster as an operation with an id and then watched. Watching may stop (Ctrl-C,
--timeout, --detach); the operation goes on, also when the leader that began it dies.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from controlplane.contract.errors import PeerError
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.status import ClusterStatus, OperationAnswer, OperationRequest
from controlplane.kfadmin.client import AdminClient, Unreachable
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.look import CLUSTER, with_options
from controlplane.kfadmin.output import console, print_checks, progress
from controlplane.kfadmin.target import connect, resolved

POLL_S = 0.2
MISSING_LIMIT_S = 5.0  # a new leader may need a moment to read the operations

Node = Annotated[str, typer.Argument(help="The node's name, such as n2.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; change nothing.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")]
Timeout = Annotated[float, typer.Option(min=0.0, help="Stop watching after so many seconds (exit code 4).")]
Deadline = Annotated[
    float, typer.Option(min=0.0, help="The cluster calls it off after so many seconds (0: never).")
]
IfEpoch = Annotated[
    int | None,
    typer.Option(
        min=0, help="Refuse unless this is the epoch counter (see `kfadmin topology`) as it begins."
    ),
]
Reason = Annotated[str, typer.Option("--reason", "-m", help="Why, for the audit.")]
OperationId = Annotated[str | None, typer.Option(help="Its name: asking twice with one name does it once.")]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options of every verb say that asks for an operation."""

    run_dir: Path | None
    admin: list[str] | None
    dry_run: bool
    operation_id: str | None
    deadline_s: float
    if_epoch: int | None
    reason: str

    def to(
        self, kind: OperationKind, node: str = "", substitute: str | None = None, **more: Any
    ) -> OperationRequest:
        """A request under the given name, or a fresh one."""
        name = self.operation_id or "-".join(filter(None, (kind.value, node, secrets.token_hex(4))))
        return OperationRequest(
            name, kind.value, node, substitute, self.dry_run, self.deadline_s,
            if_epoch=self.if_epoch, reason=self.reason, **more,
        )  # fmt: skip


def operation(timeout_s: float) -> Callable[[Callable[..., OperationRequest | None]], Callable[..., None]]:
    """Makes the verb of `make(wish, its own options) -> request`; None: there is nothing to ask the cluster for.
    `timeout_s`: for how long the end is waited for unless --timeout says."""

    def decorate(make: Callable[..., OperationRequest | None]) -> Callable[..., None]:
        def body(
            run_dir: Path | None, admin: list[str] | None, token_file: Path | None, output: Output,
            dry_run: bool, detach: bool, timeout: float, deadline: float, operation_id: str | None,
            if_epoch: int | None, reason: str, **own: Any,
        ) -> None:  # fmt: skip
            run_dir, admin, token_file = resolved(run_dir, admin, token_file)
            wish = Wish(run_dir, admin, dry_run, operation_id, deadline, if_epoch, reason)
            request = make(wish, **own)
            if request is None:
                return
            with connect(run_dir, admin, token_file) as client:
                run(client, request, output, detach, timeout)

        shared = CLUSTER | {
            "output": (OutputOption, Output.TABLE),
            "dry_run": (DryRun, False),
            "detach": (Detach, False),
            "timeout": (Timeout, timeout_s),
            "deadline": (Deadline, 0.0),
            "operation_id": (OperationId, None),
            "if_epoch": (IfEpoch, None),
            "reason": (Reason, ""),
        }
        return with_options(make, body, 1, **shared)

    return decorate


@operation(timeout_s=300.0)
def drain(wish: Wish, node: Node) -> OperationRequest:
    """Move what NODE serves elsewhere, KV included, and give it no new duty. Long generations go on."""
    return wish.to(OperationKind.DRAIN, node)


@operation(timeout_s=60.0)
def cordon(wish: Wish, node: Node) -> OperationRequest:
    """Give NODE no new duty; what it serves stays. `uncordon` takes it back."""
    return wish.to(OperationKind.CORDON, node)


@operation(timeout_s=300.0)
def undrain(wish: Wish, node: Node) -> OperationRequest:
    """Lift the cordon of NODE (after a drain or a cordon), and give it its duties back."""
    return wish.to(OperationKind.UNDRAIN, node)


@operation(timeout_s=300.0)
def replace(
    wish: Wish,
    node: Node,
    substitute: Annotated[
        str | None,
        typer.Option("--with", help="The node that takes its place (default: a fresh process of NODE)."),
    ] = None,
) -> OperationRequest:
    """Put another node, or a fresh process of the same one, in NODE's place without losing a token."""
    return wish.to(OperationKind.REPLACE, node, substitute)


def run(
    client: AdminClient,
    request: OperationRequest,
    output: Output,
    detach: bool,
    timeout_s: float,
) -> None:
    """Submit, show the pre-flight, watch it to its end; leaves with the exit code that tells how it went."""
    status = client.current()
    answer = client.submit(request)
    refused = any(check.level == "fail" for check in answer.checks) or not (
        answer.accepted or request.dry_run
    )
    nothing_changed = refused or request.dry_run
    if output.for_people:
        _print_preflight(status, answer, nothing_changed)
    if nothing_changed or answer.operation is None:
        if not output.for_people:
            show(_view(answer), output)
        raise typer.Exit(Exit.REFUSED if refused else Exit.DONE)
    operation = answer.operation
    try:  # from the first word on: who reads it may press Ctrl-C at once
        progress(f"operation {operation.id}")
        if not detach:
            operation = follow(client, operation, time.monotonic() + timeout_s, progress)
    except KeyboardInterrupt:
        progress("stopped watching")
    show(_view(msgspec.structs.replace(answer, operation=operation)), output)
    if operation.open:
        progress(f"it goes on; see `kfadmin status`, or stop it with `kfadmin cancel {operation.id}`")
    raise typer.Exit(exit_code(operation, detach))


def exit_code(operation: Operation, detach: bool) -> Exit:
    match operation.state:
        case OperationState.RUNNING:
            return Exit.DONE if detach else Exit.GOES_ON
        case OperationState.DONE:
            return Exit.DONE
        case OperationState.FAILED | OperationState.CANCELLED:
            return Exit.FAILED


def follow(
    client: AdminClient, operation: Operation, deadline: float, say: Callable[[str], None]
) -> Operation:
    """Follow it until it ends or the deadline passes; the last that was heard of it."""
    said, heard = "", time.monotonic()
    while operation.open and time.monotonic() < deadline:
        try:
            found = next((o for o in client.operations() if o.id == operation.id), None)
        except Unreachable as error:
            message, heard = f"waiting for a controller: {error}", time.monotonic()
        else:
            if found is not None:
                operation, heard = found, time.monotonic()
            elif time.monotonic() - heard > MISSING_LIMIT_S:
                raise PeerError(f"the cluster does not know the operation {operation.id} any more")
            message = operation.message
        if message and message != said:
            say(message)
            said = message
        if operation.open:
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    return operation


def line(operation: Operation) -> str:
    message = f": {operation.message}" if operation.message else ""
    what = f"{operation.kind.value} {operation.node or operation.instances or ''}".strip()
    return f"{what} {operation.state.value}{message}  ({operation.id})"


def _view(answer: OperationAnswer) -> View:
    operation = answer.operation

    def draw(_wide: bool) -> None:
        if operation is not None:
            console().print(line(operation))

    return View(answer, draw, names=[operation.id] if operation else [])


def _print_preflight(status: ClusterStatus, answer: OperationAnswer, nothing_changed: bool) -> None:
    out = console()
    out.print(f"PRE-FLIGHT  epoch {status.counter}, leader {status.leader or 'none'}")
    print_checks(answer.checks)
    if answer.plan:
        out.print(f"PLAN  {' -> '.join(answer.plan)}")
    if nothing_changed:
        out.print("Nothing was changed.")
