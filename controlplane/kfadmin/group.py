"""Verbs about the whole group: pause, resume, transfer-leader, restart."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from msgspec.structs import replace

from controlplane.contract.records import OperationKind, RestartScope
from controlplane.contract.version import code_version, settings_digest
from controlplane.kfadmin.host import restart_etcd, restart_launcher
from controlplane.kfadmin.operate import Deadline, Detach, DryRun, OperationId, Timeout, asked, run
from controlplane.kfadmin.output import Output, OutputOption
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect, find_run_dir


class Scope(StrEnum):
    NODES = "nodes"
    CONTROLLERS = "controllers"
    GATEWAYS = "gateways"
    ALL = "all"
    LAUNCHER = "launcher"
    ETCD = "etcd"


def pause(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    timeout: Timeout = 60.0,
    operation_id: OperationId = None,
) -> None:
    """Stop automation: nothing is repaired, moved or handed back until `kfadmin resume`. Streams go on."""
    request = asked(OperationKind.PAUSE, "", operation_id, dry_run)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, False, timeout)


def resume(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    timeout: Timeout = 60.0,
    operation_id: OperationId = None,
) -> None:
    """Start automation again: what died meanwhile is repaired, operations go on."""
    request = asked(OperationKind.RESUME, "", operation_id, dry_run)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, False, timeout)


def transfer_leader(
    controller: Annotated[str, typer.Argument(help="Who is to lead (default: the next candidate).")] = "",
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    timeout: Timeout = 60.0,
    deadline: Deadline = 0.0,
    operation_id: OperationId = None,
) -> None:
    """Hand leadership to another controller. No stream notices."""
    request = asked(OperationKind.TRANSFER, controller, operation_id, dry_run, deadline)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, False, timeout)


def restart(
    scope: Annotated[
        Scope,
        typer.Argument(help="nodes, controllers, gateways or all of these; on this machine: launcher, etcd."),
    ],
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    dry_run: DryRun = False,
    detach: Detach = False,
    timeout: Timeout = 3600.0,
    deadline: Deadline = 0.0,
    operation_id: OperationId = None,
) -> None:
    """Restart processes one after the other, without losing a token.

    It fails at the first one that comes back with other code or settings than this machine (--admin: the others) has.

    A node is emptied first and gets its duties back; the next one waits until the copies have caught up. The leader
    comes last of the controllers and hands over before. "launcher" and "etcd" are processes of this machine that the
    cluster does not see: they are restarted through the run directory, etcd only where it has three members or more.
    """
    if scope in (Scope.LAUNCHER, Scope.ETCD):
        local = find_run_dir(run_dir)
        (restart_launcher if scope is Scope.LAUNCHER else restart_etcd)(local, dry_run)
        return
    request = asked(OperationKind.RESTART, RestartScope(scope.value), operation_id, dry_run, deadline)
    if not admin:  # elsewhere something else may be installed
        installed = settings_digest(find_run_dir(run_dir).config())
        request = replace(request, version=code_version(), settings=installed)
    with connect(run_dir, admin, token_file) as client:
        run(client, request, output, detach, timeout)
