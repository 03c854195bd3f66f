"""`kfadmin operations`: what operators asked for, how far it is, and calling it off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from controlplane.contract.errors import RequestError
from controlplane.contract.records import Operation
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.look import CLUSTER, look, with_options
from controlplane.kfadmin.operate import Timeout, exit_code, follow, line
from controlplane.kfadmin.output import console, print_operations, progress
from controlplane.kfadmin.show import current
from controlplane.kfadmin.target import connect

app = typer.Typer(no_args_is_help=True, help="What operators asked for.")
Id = Annotated[str, typer.Argument(metavar="ID", help="The operation's id.")]


@app.command(name="list")
@look
def list_(
    client: AdminClient,
    every: Annotated[bool, typer.Option("--all", "-a", help="Also those that have ended.")] = False,
) -> View:
    """Operations that are under way, oldest first."""
    current(client)
    found = [op for op in client.operations() if every or op.open]
    return View(found, lambda wide: print_operations(found, wide), found, [op.id for op in found])


Outcome = tuple[Operation, bool]  # and whether kfadmin leaves with the exit code that tells how it went


def about_one(make: Callable[..., Outcome]) -> Callable[..., None]:
    """The verb of `make(client, timeout in seconds, its own options)`."""

    def run(run_dir: Any, admin: Any, token_file: Any, output: Output, timeout: float, **own: Any) -> None:
        with connect(run_dir, admin, token_file) as client:
            found, ends = make(client, timeout, **own)
        show(View(found, lambda _wide: console().print(line(found)), names=[found.id]), output)
        if ends:
            raise typer.Exit(exit_code(found, detach=False))

    shared = CLUSTER | {"output": (OutputOption, Output.TABLE), "timeout": (Timeout, 300.0)}
    return with_options(make, run, 2, **shared)


@app.command()
@about_one
def watch(client: AdminClient, timeout_s: float, operation: Id) -> Outcome:
    """Follow an operation to its end. Exit codes: 0 done, 1 failed or cancelled, 4 still running."""
    client.current()
    found = next((op for op in client.operations() if op.id == operation), None)
    if found is None:
        raise RequestError(f"there is no operation {operation}")
    with contextlib.suppress(KeyboardInterrupt):
        found = follow(client, found, time.monotonic() + timeout_s, progress)
    return found, True


@app.command()
@about_one
def cancel(client: AdminClient, timeout_s: float, operation: Id) -> Outcome:
    """Call an operation off. What it has switched already stays switched."""
    return client.cancel(operation), False
