"""Verbs about the whole group: pause, resume, transfer-leader, scale, restart."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from msgspec.structs import replace

from controlplane.contract.errors import RequestError
from controlplane.contract.records import OperationKind, RestartScope
from controlplane.contract.status import OperationRequest
from controlplane.contract.version import code_version, settings_digest
from controlplane.kfadmin.host import restart_etcd, restart_launcher
from controlplane.kfadmin.operate import Wish, operation
from controlplane.kfadmin.target import find_run_dir


class Scope(StrEnum):
    NODES = "nodes"
    CONTROLLERS = "controllers"
    GATEWAYS = "gateways"
    ALL = "all"
    LAUNCHER = "launcher"
    ETCD = "etcd"


@operation(timeout_s=60.0)
def pause(wish: Wish) -> OperationRequest:
    """Stop automation: nothing is repaired, moved or handed back until `kfadmin resume`. Streams go on."""
    return wish.to(OperationKind.PAUSE)


@operation(timeout_s=60.0)
def resume(wish: Wish) -> OperationRequest:
    """Start automation again: what died meanwhile is repaired, operations go on."""
    return wish.to(OperationKind.RESUME)


@operation(timeout_s=60.0)
def transfer_leader(
    wish: Wish,
    controller: Annotated[str, typer.Argument(help="Who is to lead (default: the next candidate).")] = "",
) -> OperationRequest:
    """Hand leadership to another controller. No stream notices."""
    return wish.to(OperationKind.TRANSFER, controller)


@operation(timeout_s=3600.0)
def scale(
    wish: Wish,
    instances: Annotated[int, typer.Argument(min=1, help="How many the group is to have.")],
) -> OperationRequest:
    """Add or remove instances while all of them serve; no stream ends for it.

    The launcher of this machine starts the nodes of new ones (elsewhere: launchers without --nodes do, or start theirs
    with their names). Of those that go, the last ones, the stages move to nodes of the others, KV included, and the
    nodes end; each instance is gone once its streams have ended.
    """
    return wish.to(OperationKind.SCALE, instances=instances)


@operation(timeout_s=3600.0)
def restart(
    wish: Wish,
    scope: Annotated[
        Scope,
        typer.Argument(help="nodes, controllers, gateways or all of these; on this machine: launcher, etcd."),
    ],
    instance: Annotated[
        str, typer.Option(help="With nodes: only those of this instance, such as p1, as a canary.")
    ] = "",
) -> OperationRequest | None:
    """Restart processes one after the other, without losing a token.

    It fails at the first one that comes back with other code or settings than this machine (--admin: the others) has.

    A node is emptied first and gets its duties back; the next one waits until the copies have caught up. The leader
    comes last of the controllers and hands over before. "launcher" and "etcd" are processes of this machine that the
    cluster does not see: they are restarted through the run directory, etcd only where it has three members or more.
    """
    if instance and scope is not Scope.NODES:
        raise RequestError("--instance goes with nodes")
    if scope in (Scope.LAUNCHER, Scope.ETCD):
        if wish.admin and wish.run_dir is None:
            raise RequestError(f"{scope.value} is restarted on its own machine: give --run-dir")
        local = find_run_dir(wish.run_dir)
        (restart_launcher if scope is Scope.LAUNCHER else restart_etcd)(local, wish.dry_run)
        return None
    request = wish.to(OperationKind.RESTART, instance or RestartScope(scope.value))
    if wish.admin:  # elsewhere something else may be installed
        return request
    installed = settings_digest(find_run_dir(wish.run_dir).config())
    return replace(request, version=code_version(), settings=installed)
