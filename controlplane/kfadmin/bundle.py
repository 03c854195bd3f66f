"""`kfadmin support-bundle`: what somebody needs who helps, in one file, without what opens a door."""

from __future__ import annotations

import io
import re
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
import typer

from controlplane.contract.auth import derive, load_secret
from controlplane.contract.config import redacted
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.files import new_file
from controlplane.contract.version import code_version
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.target import (
    AdminOption,
    RunDirOption,
    TokenFileOption,
    connect,
    find_run_dir,
    read_token,
    resolved,
)

LOG_BYTES_MAX = 1 << 20  # the end of each log
HIDDEN = "[redacted]"
PURPOSES = ("admin", "grpc", "streams")  # what is derived from the cluster's secret
# What opens a door wherever it stands, although nobody told us of it.
PATTERNS = (
    re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/=@-]{8,}"),
    re.compile(r"(?<=://)[^\s/@\"']+:[^\s/\"']*(?=@)"),  # user and password in a URL
    # API keys of `kfadmin up`, and with their secrets of `kfadmin keys`.
    re.compile(r"\bkf-[0-9a-f]{16,}(?:-[\w-]+)?"),
    re.compile(r"\bkevlarflow_(?:admin|login)=\"?[^\s;,\"']+"),  # sessions of browsers
    re.compile(r"\bkf\.[a-z]+\.[A-Za-z0-9_@-]+\.[0-9]+\.[0-9a-f]{64}\b"),  # minted tokens
)


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, and without whatever looks like a credential."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(HIDDEN, text)
    return text


def support_bundle(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    file: Annotated[Path | None, typer.Option(help="Where to write it (default: this directory).")] = None,
) -> None:
    """Collect status, history, operations, incidents, settings, metrics and the ends of the logs into one .tar.gz.

    Secrets, tokens, API keys and passwords are taken out. Names, addresses and messages of the cluster are in it. What
    cannot be had is said in errors.txt.
    """
    run_dir, admin, token_file = resolved(run_dir, admin, token_file)
    local = None if admin else find_run_dir(run_dir)
    secrets = _secrets(local, token_file)
    path = file or Path(time.strftime("kevlarflow-support-%Y%m%d-%H%M%S.tar.gz"))
    errors: list[str] = []
    parts: dict[str, str] = {"version.txt": f"kfadmin {code_version()}\n"}
    try:
        with connect(run_dir, admin, token_file) as client:
            for name, ask in _questions(client).items():
                try:
                    parts[name] = ask()
                except KevlarFlowError as error:
                    errors.append(f"{name}: {error}")
    except KevlarFlowError as error:
        errors.append(f"the cluster: {error}")
    if local is not None:
        parts |= _of_this_machine(local, errors)
    if errors:
        parts["errors.txt"] = "\n".join(errors) + "\n"
    _write(path, {name: redact(text, secrets) for name, text in parts.items()})
    for line in errors:
        progress(redact(f"not in the bundle: {line}", secrets))
    print(path)


def _questions(client: AdminClient) -> dict[str, Callable[[], str]]:
    return {
        "status.json": lambda: _json(client.current()),
        "quorum.json": lambda: _json(client.quorum()),
        "operations.json": lambda: _json(client.operations()),
        "events.json": lambda: _json(client.events(1000)),
        "incidents.json": lambda: _json(client.incidents(1000)),
        "audit.json": lambda: _json(client.audit(1000)),
        "settings.json": lambda: _json(client.settings()),
        "metrics.txt": client.metrics,
    }


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n"


def _of_this_machine(local: RunDir, errors: list[str]) -> dict[str, str]:
    """Settings, processes and logs of a run directory."""
    parts: dict[str, str] = {}
    try:
        parts["machine/cluster.json"] = _json(redacted(local.config()))
    except ConfigError as error:
        errors.append(f"machine/cluster.json: {error}")
    for folder in ("pids", "nodes", "relay"):
        if found := local.processes(folder):
            parts[f"machine/{folder}.json"] = _json(found)
    for log in sorted((local.path / "logs").glob("*.log")):
        try:
            with log.open("rb") as stream:
                stream.seek(max(0, log.stat().st_size - LOG_BYTES_MAX))
                parts[f"logs/{log.name}"] = stream.read().decode(errors="replace")
        except OSError as error:
            errors.append(f"logs/{log.name}: {error.strerror}")
    return parts


def _secrets(local: RunDir | None, token_file: Path | None) -> set[str]:
    found: set[str] = set()
    if token_file is not None:
        found.add(read_token(token_file))
    if local is None:
        return found
    for source in (
        _of_the_secret,
        _api_keys,
        _database_password,
    ):  # what one lacks says nothing of the others
        try:
            found |= source(local)
        except (ConfigError, OSError) as error:
            progress(f"{error}: only what looks like a credential is taken out")
    return found


def _of_the_secret(local: RunDir) -> set[str]:
    secret = load_secret(local.path / "secret")
    return {secret.decode(errors="replace"), *(derive(secret, purpose) for purpose in PURPOSES)}


def _api_keys(local: RunDir) -> set[str]:
    path = local.path / "api-keys"
    return set(path.read_text(errors="replace").split()) if path.exists() else set()


def _database_password(local: RunDir) -> set[str]:
    account = local.config().database_url.partition("://")[2].rpartition("@")[0]
    password = account.partition(":")[2]
    return {password, unquote(password)}


def _write(path: Path, parts: dict[str, str]) -> None:
    """For this user alone; it must not be there yet."""
    folder = path.name.removesuffix(".gz").removesuffix(".tar")
    with new_file(path) as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, text in sorted(parts.items()):
            body = text.encode()
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size, info.mtime, info.mode = len(body), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(body))
