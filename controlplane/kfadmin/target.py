"""Which cluster a verb talks to: options that all verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from controlplane.contract.errors import ConfigError
from controlplane.kfadmin.client import AdminClient, NotAllowed, Unreachable
from controlplane.kfadmin.contexts import chosen
from controlplane.kfadmin.rundir import Endpoints, RunDir, admin_endpoints, default_run_dir

RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="Directory of a local cluster (default: $KF_RUN_DIR or the state directory).",
    ),
]
AdminOption = Annotated[
    list[str] | None,
    typer.Option("--admin", help="URL of a controller's admin API instead; may be given several times."),
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="File with the admin token, for --admin.")
]


def find_run_dir(run_dir: Path | None) -> RunDir:
    return RunDir(run_dir or default_run_dir())


def resolved(
    run_dir: Path | None, admin: list[str] | None, token_file: Path | None
) -> tuple[Path | None, list[str] | None, Path | None]:
    """The same options, from the context where they do not say which cluster. Raises RequestError, ConfigError."""
    if run_dir is not None or admin or (context := chosen()) is None:
        return run_dir, admin, token_file
    file = token_file or (Path(context.token_file) if context.token_file else None)
    return (Path(context.run_dir) if context.run_dir else None), list(context.admin) or None, file


def connect(
    run_dir: Path | None, admin: list[str] | None, token_file: Path | None, limit_s: float = 0.0
) -> AdminClient:
    """A client of the cluster that the options name, else the context. `limit_s`: see AdminClient.

    Raises Unreachable when there is none, NotAllowed when its token may not be read, ConfigError, RequestError.
    """
    of_context = None if run_dir is not None or admin else chosen()
    ca_file = of_context.ca_file if of_context is not None else ""
    run_dir, admin, token_file = resolved(run_dir, admin, token_file)
    local = find_run_dir(run_dir)
    try:
        urls = tuple(url.rstrip("/") for url in admin or ())
        known = Endpoints((), urls, ca=ca_file) if admin else local.endpoints()
        endpoints, ca = list(known.admin) if admin else admin_endpoints(known), known.ca
    except ConfigError as error:
        raise Unreachable(f"{error}; start one with `kfadmin up`, or give --run-dir or --admin") from error
    if bad := [url for url in endpoints if not url.startswith(("http://", "https://", "unix:"))]:
        raise typer.BadParameter(f"{bad[0]!r} is not a URL (http://HOST:PORT)", param_hint="--admin")
    if token_file is None:
        return AdminClient(endpoints, local.admin_token(), limit_s, ca)
    return AdminClient(endpoints, read_token(token_file), limit_s, ca)


def read_token(token_file: Path) -> str:
    """Raises NotAllowed."""
    try:
        return token_file.read_text().strip()
    except PermissionError as error:
        raise NotAllowed(f"cannot read {token_file}: {error.strerror}") from error
    except OSError as error:
        raise typer.BadParameter(f"{token_file}: {error.strerror}", param_hint="--token-file") from error
