"""Verbs about one node: drain, cordon, uncordon, undrain, replace; and cancel, for any operation.

Each is declared to the cluster as an operation with an id and then watched. Watching may stop (Ctrl-C,
--timeout, --detach); the operation goes on, also when the leader that began it dies.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Annotated

import msgspec
import typer

from controlplane.contract.errors import PeerError
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.status import ClusterStatus, OperationAnswer, OperationRequest
from controlplane.kfadmin.client import AdminClient, Unreachable
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.output import Output, OutputOption, console, print_checks, print_json, progress
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect

POLL_S = 0.2
MISSING_LIMIT_S = 5.0  # a new leader may need a moment to read the operations

Node = Annotated[str, typer.Argument(help="The node's name, such as n2.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; change nothing.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")]
Timeout = Annotated[float, typer.Option(min=0.0, help="Stop watching after so many seconds (exit code 4).")]
Deadline = Annotated[
    float, typer.Option(min=0.0, help="The cluster calls it off after so many seconds (0: never).")
]
OperationId = Annotated[str | None, typer.Option(help="Its name: asking twice with one name does it once.")]


def drain(
    node: Node,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    detach: Detach = False,
    timeout: Timeout = 300.0,
    deadline: Deadline = 0.0,
    operation_id: OperationId = None,
) -> None:
    """Move what NODE serves elsewhere, KV included, and give it no new duty. Long generations go on."""
    request = asked(OperationKind.DRAIN, node, operation_id, dry_run, deadline)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, detach, timeout)


def cordon(
    node: Node,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    timeout: Timeout = 60.0,
    operation_id: OperationId = None,
) -> None:
    """Give NODE no new duty; what it serves stays. `uncordon` takes it back."""
    request = asked(OperationKind.CORDON, node, operation_id, dry_run)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, False, timeout)


def undrain(
    node: Node,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    detach: Detach = False,
    timeout: Timeout = 300.0,
    deadline: Deadline = 0.0,
    operation_id: OperationId = None,
) -> None:
    """Lift the cordon of NODE (after a drain or a cordon), and give it its duties back."""
    request = asked(OperationKind.UNDRAIN, node, operation_id, dry_run, deadline)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, detach, timeout)


def replace(
    node: Node,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    substitute: Annotated[
        str | None,
        typer.Option("--with", help="The node that takes its place (default: a fresh process of NODE)."),
    ] = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    detach: Detach = False,
    timeout: Timeout = 300.0,
    deadline: Deadline = 0.0,
    operation_id: OperationId = None,
) -> None:
    """Put another node, or a fresh process of the same one, in NODE's place without losing a token."""
    request = asked(OperationKind.REPLACE, node, operation_id, dry_run, deadline, substitute)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, detach, timeout)


def cancel(
    operation: Annotated[str, typer.Argument(help="The operation's id.")],
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Call an operation off. What it has switched already stays switched."""
    with connect(run_dir, admin, token_file) as client:
        answer = client.cancel(operation)
    if output is Output.JSON:
        print_json(answer)
    else:
        console().print(_line(answer))


def asked(
    kind: OperationKind,
    node: str,
    operation_id: str | None,
    dry_run: bool,
    deadline_s: float = 0.0,
    substitute: str | None = None,
) -> OperationRequest:
    """A request under the given name, or a fresh one."""
    name = operation_id or "-".join(filter(None, (kind.value, node, secrets.token_hex(4))))
    return OperationRequest(name, kind.value, node, substitute, dry_run, deadline_s)


def run(
    client: AdminClient,
    request: OperationRequest,
    output: Output,
    detach: bool,
    timeout_s: float,
) -> None:
    """Submit, show the pre-flight, watch it to its end; leaves with the exit code that tells how it went."""
    status = client.status()
    answer = client.submit(request)
    refused = any(check.level == "fail" for check in answer.checks) or not (
        answer.accepted or request.dry_run
    )
    nothing_changed = refused or request.dry_run
    if output is Output.TABLE:
        _print_preflight(status, answer, nothing_changed)
    if nothing_changed or answer.operation is None:
        if output is Output.JSON:
            print_json(answer)
        raise typer.Exit(Exit.REFUSED if refused else Exit.DONE)
    operation = answer.operation
    try:  # from the first word on: who reads it may press Ctrl-C at once
        progress(f"operation {operation.id}")
        if not detach:
            operation = _watch(client, operation, time.monotonic() + timeout_s, progress)
    except KeyboardInterrupt:
        progress("stopped watching")
    if output is Output.JSON:
        print_json(msgspec.structs.replace(answer, operation=operation))
    else:
        console().print(_line(operation))
    if operation.open:
        progress(f"it goes on; see `kfadmin status`, or stop it with `kfadmin cancel {operation.id}`")
    raise typer.Exit(_exit_code(operation, detach))


def _exit_code(operation: Operation, detach: bool) -> Exit:
    match operation.state:
        case OperationState.RUNNING:
            return Exit.DONE if detach else Exit.GOES_ON
        case OperationState.DONE:
            return Exit.DONE
        case OperationState.FAILED | OperationState.CANCELLED:
            return Exit.FAILED


def _watch(
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


def _line(operation: Operation) -> str:
    message = f": {operation.message}" if operation.message else ""
    what = f"{operation.kind.value} {operation.node}".strip()
    return f"{what} {operation.state.value}{message}  ({operation.id})"


def _print_preflight(status: ClusterStatus, answer: OperationAnswer, nothing_changed: bool) -> None:
    out = console()
    out.print(f"PRE-FLIGHT  epoch {status.counter}, leader {status.leader or 'none'}")
    print_checks(answer.checks)
    if answer.plan:
        out.print(f"PLAN  {' -> '.join(answer.plan)}")
    if nothing_changed:
        out.print("Nothing was changed.")
