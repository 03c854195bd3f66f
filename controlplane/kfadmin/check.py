"""`kfadmin check`: would it be safe? Nothing is changed. Exit codes: 0 yes (warnings included), 3 no, 5 unreachable."""

from __future__ import annotations

from typing import Annotated

import typer

from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.operate import Node, asked
from controlplane.kfadmin.output import Output, OutputOption, print_checks, print_json
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect

app = typer.Typer(
    no_args_is_help=True,
    help="Would it be safe? Changes nothing. Exit codes: 0 yes (there may be warnings), 3 no, 5 unreachable.",
)


@app.command()
def drain(
    node: Node,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Could NODE be drained now?"""
    with connect(run_dir, admin, token_file) as client:
        _tell(_preflight(client, OperationKind.DRAIN, node), output)


@app.command()
def replace(
    node: Node,
    substitute: Annotated[
        str | None, typer.Option("--with", help="The node that would take its place.")
    ] = None,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Could NODE be replaced now?"""
    with connect(run_dir, admin, token_file) as client:
        _tell(_preflight(client, OperationKind.REPLACE, node, substitute), output)


@app.command()
def quorum(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Can the cluster be changed (etcd's members, the leader), and would it still after one more loss?"""
    with connect(run_dir, admin, token_file) as client:
        _tell(client.quorum(), output)


def _preflight(
    client: AdminClient, kind: OperationKind, node: str, substitute: str | None = None
) -> tuple[Check, ...]:
    return client.submit(asked(kind, node, None, dry_run=True, substitute=substitute)).checks


def _tell(checks: tuple[Check, ...], output: Output) -> None:
    if output is Output.JSON:
        print_json({"checks": checks})
    else:
        print_checks(checks)
    raise typer.Exit(Exit.REFUSED if any(check.level == "fail" for check in checks) else Exit.DONE)
