"""Contexts: names for clusters, so that one command reaches several. The file has where they are, never a token."""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from controlplane.contract.errors import ConfigError, RequestError
from controlplane.contract.files import is_blank, replace_file
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.output import console, table
from controlplane.kfadmin.rundir import home
from controlplane.unreadable import UNREADABLE

CHOSEN: ContextVar[str] = ContextVar("chosen", default="")  # `kfadmin --context NAME`, or $KF_CONTEXT


class Context(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a cluster is: a run directory of this machine, or admin APIs and the file with the token for them."""

    run_dir: str = ""
    admin: tuple[str, ...] = ()
    token_file: str = ""
    ca_file: str = ""  # authorities of the admin APIs' certificates, beside those of the system


class Contexts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    current: str = ""
    contexts: dict[str, Context] = {}


def contexts_file() -> Path:
    """$KF_CONTEXTS, else in the user's configuration directory."""
    if given := os.environ.get("KF_CONTEXTS"):
        return Path(given)
    config = os.environ.get("XDG_CONFIG_HOME") or home() / ".config"
    return Path(config) / "kevlarflow" / "contexts.json"


def load() -> Contexts:
    """Raises ConfigError when the file is there and cannot be read."""
    path = contexts_file()
    if is_blank(path):
        return Contexts()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Contexts)
    except (OSError, *UNREADABLE) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def save(contexts: Contexts) -> None:
    path = contexts_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, msgspec.json.format(msgspec.json.encode(contexts), indent=2) + b"\n")


def chosen() -> Context | None:
    """The context that is asked for, else the current one unless $KF_RUN_DIR says where to go; None: there is none.

    Raises RequestError, ConfigError."""
    known = load()
    name = CHOSEN.get() or ("" if os.environ.get("KF_RUN_DIR") else known.current)
    if not name:
        return None
    found = known.contexts.get(name)
    if found is None:
        there = ", ".join(sorted(known.contexts)) or "none"
        raise RequestError(f"there is no context {name}; known are: {there} (`kfadmin context set`)")
    return found


app = typer.Typer(no_args_is_help=True, help="Names for clusters. Use one with `kfadmin --context NAME`.")
Name = Annotated[str, typer.Argument(help="The context's name.")]


@app.command(name="list")
def list_(output: OutputOption = Output.TABLE) -> None:
    """Every context; the current one has a star."""
    known = load()

    def draw(_wide: bool) -> None:
        rows = table("", "NAME", "WHERE", "TOKEN FILE")
        for name, one in sorted(known.contexts.items()):
            star = "*" if name == known.current else ""
            rows.add_row(star, name, one.run_dir or " ".join(one.admin), one.token_file or "-")
        console().print(rows)

    items = [{"name": name, "context": one} for name, one in sorted(known.contexts.items())]
    show(View(known, draw, items, sorted(known.contexts)), output)


@app.command(name="set")
def set_(
    name: Name,
    run_dir: Annotated[Path | None, typer.Option(help="Directory of a local cluster.")] = None,
    admin: Annotated[list[str] | None, typer.Option(help="URL of a controller's admin API.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="File with the authorities of https:// URLs, beside the system's.")
    ] = None,
) -> None:
    """Make a context, or another one of the same name."""
    if (run_dir is None) == (not admin):
        raise typer.BadParameter("give either --run-dir or --admin")
    known = load()
    made = Context(
        "" if run_dir is None else str(run_dir.absolute()),
        tuple(admin or ()),
        "" if token_file is None else str(token_file.absolute()),
        "" if ca_file is None else str(ca_file.absolute()),
    )
    save(Contexts(known.current or name, {**known.contexts, name: made}))


@app.command()
def use(name: Name) -> None:
    """Make NAME the current context."""
    known = load()
    if name not in known.contexts:
        raise RequestError(f"there is no context {name}")
    save(Contexts(name, known.contexts))


@app.command()
def remove(name: Name) -> None:
    """Forget a context."""
    known = load()
    if name not in known.contexts:
        raise RequestError(f"there is no context {name}")
    left = {other: one for other, one in known.contexts.items() if other != name}
    save(Contexts("" if known.current == name else known.current, left))
