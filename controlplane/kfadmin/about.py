"""Verbs about kfadmin itself: version, completion."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from typer._completion_shared import get_completion_script

from controlplane.contract.status import made_of, mixtures
from controlplane.contract.version import code_version
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.output import WARN, console, table
from controlplane.kfadmin.show import current
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect

COMPLETE = "_KFADMIN_COMPLETE"  # set by the script, when a shell asks


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def version(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    client: Annotated[bool, typer.Option("--client", help="Only of this kfadmin; ask no cluster.")] = False,
) -> None:
    """The version of this kfadmin, and of every process of the cluster."""
    mine = code_version()
    if client:
        show(View({"kfadmin": mine}, lambda _wide: print(f"kfadmin {mine}"), names=[mine]), output)
        return
    with connect(run_dir, admin, token_file) as asked:
        status = current(asked)
    processes = [
        {"name": name, "version": code, "settings": settings} for name, code, settings in made_of(status)
    ]

    def draw(_wide: bool) -> None:
        out = console()
        out.print(f"kfadmin {mine}")
        rows = table("PROCESS", "VERSION", "SETTINGS")
        for one in processes:
            rows.add_row(one["name"], one["version"] or "-", one["settings"] or "-")
        out.print(rows)
        for what in mixtures(status):
            out.print(what, style=WARN)

    value = {"kfadmin": mine, "processes": processes, "mixtures": mixtures(status)}
    show(View(value, draw, processes, [mine]), output)


def completion(shell: Annotated[Shell, typer.Argument(help="Whose.")]) -> None:
    """Print the script that makes a shell complete kfadmin's verbs and options: `eval "$(kfadmin completion bash)"`."""
    print(get_completion_script(prog_name="kfadmin", complete_var=COMPLETE, shell=shell.value))
