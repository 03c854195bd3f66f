"""`kfadmin check`: would it be safe? Nothing is changed. Exit codes: 0 yes (warnings included), 3 no, 5 unreachable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.look import CLUSTER, Patience, with_options
from controlplane.kfadmin.operate import Node, Wish
from controlplane.kfadmin.output import print_checks
from controlplane.kfadmin.target import connect

app = typer.Typer(
    no_args_is_help=True,
    help="Would it be safe? Changes nothing. Exit codes: 0 yes (there may be warnings), 3 no, 5 unreachable.",
)


def checking(make: Callable[..., tuple[Check, ...]]) -> Callable[..., None]:
    """The verb of `make(client, its own options) -> checks`."""

    def run(run_dir: Any, admin: Any, token_file: Any, output: Output, timeout: float, **own: Any) -> None:
        with connect(run_dir, admin, token_file, timeout) as client:
            checks = make(client, **own)
        names = [check.name for check in checks]
        show(View({"checks": checks}, lambda _wide: print_checks(checks), checks, names), output)
        raise typer.Exit(Exit.REFUSED if any(check.level == "fail" for check in checks) else Exit.DONE)

    shared = CLUSTER | {"output": (OutputOption, Output.TABLE), "timeout": (Patience, 0.0)}
    return with_options(make, run, 1, **shared)


@app.command()
@checking
def drain(client: AdminClient, node: Node) -> tuple[Check, ...]:
    """Could NODE be drained now?"""
    return _preflight(client, OperationKind.DRAIN, node)


@app.command()
@checking
def replace(
    client: AdminClient,
    node: Node,
    substitute: Annotated[
        str | None, typer.Option("--with", help="The node that would take its place.")
    ] = None,
) -> tuple[Check, ...]:
    """Could NODE be replaced now?"""
    return _preflight(client, OperationKind.REPLACE, node, substitute)


@app.command()
@checking
def quorum(client: AdminClient) -> tuple[Check, ...]:
    """Can the cluster be changed (etcd's members, the leader), and would it still after one more loss?"""
    return client.quorum()


def _preflight(
    client: AdminClient, kind: OperationKind, node: str, substitute: str | None = None
) -> tuple[Check, ...]:
    client.current()  # from the leader, if it is among the endpoints
    wish = Wish(None, None, dry_run=True, operation_id=None, deadline_s=0.0, if_epoch=None, reason="")
    return client.submit(wish.to(kind, node, substitute)).checks
