"""`kfadmin token`: tokens with a name, a role and an expiry, in place of the cluster's own for people and scrapers."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from controlplane.contract.auth import TOKEN_S_MAX, Role, identify, mint
from controlplane.contract.credentials import Change, CredentialChange
from controlplane.contract.errors import RequestError
from controlplane.contract.files import new_file
from controlplane.contract.revocations import RevokeRequest, token_id
from controlplane.kfadmin.client import NotAllowed
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.noted import NOTE_S, note, who
from controlplane.kfadmin.output import clock, console, progress
from controlplane.kfadmin.target import (
    AdminOption,
    RunDirOption,
    TokenFileOption,
    connect,
    find_run_dir,
    read_token,
    resolved,
)

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = typer.Typer(no_args_is_help=True, help="Tokens with a name, a role and an expiry.")
AdminTokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="File with the cluster's own admin token (default: run dir)."),
]


def seconds_of(text: str) -> int:
    """ "8h" as seconds. Raises RequestError."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    length_s = int(found[1]) * UNITS_S[found[2]] if found else 0
    if not 0 < length_s <= TOKEN_S_MAX:
        raise RequestError(f"{text!r}: a time such as 30m, 8h or 7d, at most 366d")
    return length_s


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is: what the audit will say.")],
    role: Annotated[Role, typer.Option(help="metrics: only /metrics; viewer: read; operator: change.")],
    valid: Annotated[str, typer.Option("--for", help="How long it is good: 30m, 8h, 7d.")] = "8h",
    file: Annotated[Path | None, typer.Option(help="Write it there (mode 0600), not to stdout.")] = None,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: AdminTokenFile = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a token. Only the audit is told of it; `kfadmin token revoke` takes it back before it expires."""
    expiry = int(time.time()) + seconds_of(valid)
    made = mint(_admin_token(run_dir, token_file, admin), name, role, expiry)
    about = {"name": name, "role": role, "expiry_unix_s": expiry}
    if file is None:
        _note(made, name, role, run_dir, admin, token_file)
        show(View({"token": made} | about, lambda _wide: print(made), names=[made]), output)
        return
    with new_file(file) as out:
        out.write(made.encode() + b"\n")
    _note(made, name, role, run_dir, admin, token_file)
    show(View({"file": str(file)} | about, lambda _wide: None, names=[str(file)]), output)


@app.command(name="show")
def show_(
    file: Annotated[Path, typer.Argument(help="File with a token.")],
    run_dir: RunDirOption = None,
    token_file: AdminTokenFile = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Whose token it is, what it may do, and until when. Needs the cluster's own token. Exit code 6: it is no good."""
    caller = identify(read_token(file), _admin_token(run_dir, token_file), time.time())
    if caller is None:
        raise NotAllowed(f"{file}: not this cluster's token, or it has expired")

    def draw(_wide: bool) -> None:
        until = clock(caller.expiry_unix_s) if caller.expiry_unix_s else "for ever"
        console().print(f"{caller.name}, {caller.role.value}, until {until}")

    show(View(caller, draw, names=[caller.name]), output)


@app.command()
def revoke(
    name: Annotated[
        str,
        typer.Argument(
            help="All tokens and sessions of this name, as the audit has it (PROVIDER:SUBJECT, too)."
        ),
    ] = "",
    file: Annotated[Path | None, typer.Option(help="File with the one token that is to be revoked.")] = None,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a token back, and the dashboard's sessions that it has opened. Needs the cluster's own token.

    With a name: whatever was and will be given to it for 366 days, so give the next token another one; of somebody at a
    login provider for 12 hours, by when their sessions have ended: take their roles there away before. Every controller
    refuses it as soon as etcd tells, within a second.
    """
    if bool(name) == (file is not None):
        raise RequestError("give a name, or --file with a token")
    with connect(run_dir, admin, token_file) as client:
        found = client.revoke(RevokeRequest(name, "" if file is None else read_token(file)))
    what = "everything" if name else "a token"
    words = f"{what} of {found.name} is revoked, until {clock(found.expiry_unix_s)}"
    show(View(found, lambda _wide: progress(words), names=[found.name]), output)


def _note(
    made: str, name: str, role: Role, run_dir: Path | None, admin: list[str] | None, token_file: Path | None
) -> None:
    change = CredentialChange(Change.TOKEN_CREATED, token_id(made), name, who(), role.value)
    note(lambda: connect(run_dir, admin, token_file, NOTE_S), change)


def _admin_token(run_dir: Path | None, token_file: Path | None, admin: list[str] | None = None) -> str:
    run_dir, admin, token_file = resolved(run_dir, admin, token_file)
    if token_file is not None:
        return read_token(token_file)
    if admin:
        raise RequestError("give --token-file: the context names no run directory")
    return find_run_dir(run_dir).admin_token()
