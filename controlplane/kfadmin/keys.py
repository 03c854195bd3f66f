"""`kfadmin keys`: clients' API keys, with names and limits. Gateways read the file again when it has changed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from controlplane.contract.api_keys import KeyLimits, KeyRecord, changing, make_key, read_keys
from controlplane.contract.credentials import Change, CredentialChange
from controlplane.contract.errors import RequestError
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.noted import NOTE_S, note, who
from controlplane.kfadmin.output import clock, console, progress, table
from controlplane.kfadmin.target import RunDirOption, connect, find_run_dir
from controlplane.kfadmin.tokens import seconds_of

FILE = "keys.json"  # in the run directory

app = typer.Typer(no_args_is_help=True, help="Clients' API keys: names, limits, what may be used until when.")
FileOption = Annotated[
    Path | None, typer.Option("--file", help="The file of a gateway's host (default: RUN_DIR/keys.json).")
]


class Shown(msgspec.Struct, frozen=True):
    """A key as it is told: nothing of what lets somebody in."""

    id: str
    name: str
    owner: str
    state: str
    created_unix_s: int
    expires_unix_s: int
    limits: KeyLimits
    metrics: bool = False


def _path(run_dir: Path | None, file: Path | None) -> Path:
    path = file or find_run_dir(run_dir).path / FILE
    if not path.parent.is_dir():
        raise RequestError(
            f"there is no directory {path.parent}: name the run directory of a cluster, or a file in one"
        )
    return path


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What metrics and logs call it: letters, digits, . _ @ -")],
    owner: Annotated[str, typer.Option(help="Whom to ask about it.")] = "",
    valid: Annotated[
        str, typer.Option("--for", help="How long it is good: 8h, 90d. For ever, if not given.")
    ] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="Only this model; may be given several times.")
    ] = None,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="0: no limit, as for the others.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Prompt and output together.")] = 0,
    streams: Annotated[int, typer.Option(min=0, help="Requests at a time.")] = 0,
    memory_bytes: Annotated[int, typer.Option(min=0, help="That its requests keep in a gateway.")] = 0,
    priority_floor: Annotated[
        int | None, typer.Option(help="The most urgent priority; lower runs first.")
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="For a scraper: /metrics of the gateways, and nothing else.")
    ] = False,
    run_dir: RunDirOption = None,
    file: FileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept. Each gateway counts limits for itself."""
    limits = KeyLimits(
        tuple(model or ()), requests_per_minute, tokens_per_minute, streams, memory_bytes, priority_floor
    )
    now = int(time.time())
    if metrics and limits != KeyLimits():
        raise RequestError(
            "a key for metrics alone asks for nothing that limits are for: leave one of them out"
        )
    text, record = make_key(name, owner, now, now + seconds_of(valid) if valid else 0, limits, metrics)
    with changing(_path(run_dir, file)) as keys:
        if any(key.name == name and not key.revoked_unix_s for key in keys):
            raise RequestError(f"there is a key {name} already: revoke it first, or choose another name")
        keys.append(record)
    _note(Change.KEY_CREATED, [record], run_dir, file)
    view = View(
        {"key": text} | msgspec.to_builtins(_shown(record, now)), lambda _wide: print(text), names=[text]
    )
    show(view, output)


@app.command(name="list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Revoked and expired ones, too.")] = False,
    run_dir: RunDirOption = None,
    file: FileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Keys that are good."""
    now = time.time()
    found = [_shown(key, now) for key in read_keys(_path(run_dir, file)).keys]
    found = [key for key in found if everything or key.state == "active"]

    def draw(wide: bool) -> None:
        drawn = table("id", "name", "owner", "state", "until", "limits", *(["created"] if wide else []))
        for key in found:
            until = clock(key.expires_unix_s) if key.expires_unix_s else "for ever"
            more = [clock(key.created_unix_s)] if wide else []
            drawn.add_row(key.id, key.name, key.owner, key.state, until, _words(key), *more)
        console().print(drawn)

    show(View(found, draw, items=found, names=[key.name for key in found]), output)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Its name or its id.")],
    run_dir: RunDirOption = None,
    file: FileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """A key is no longer good: within a second or two no gateway that reads this file lets it in. What runs goes on."""
    with changing(_path(run_dir, file)) as keys:
        found = [n for n, each in enumerate(keys) if key in (each.id, each.name) and not each.revoked_unix_s]
        if not found:
            raise RequestError(f"there is no key {key} that could be revoked: see `kfadmin keys list --all`")
        now = int(time.time())
        for number in found:
            keys[number] = msgspec.structs.replace(keys[number], revoked_unix_s=now)
        revoked = [keys[number] for number in found]
    _note(Change.KEY_REVOKED, revoked, run_dir, file)
    told = [_shown(each, now) for each in revoked]
    names = [each.name for each in told]
    show(View(told, lambda _wide: progress(f"{key} is revoked"), told, names), output)


def _note(change: Change, keys: list[KeyRecord], run_dir: Path | None, file: Path | None) -> None:
    """Of the cluster that the file is of: no other one's audit is told."""
    place = run_dir or (file.parent if file is not None else find_run_dir(None).path)
    by = who()
    note(
        lambda: connect(place, None, None, NOTE_S),
        *(CredentialChange(change, key.id, key.name, by, _line(key.owner)) for key in keys),
    )


def _line(text: str) -> str:
    return "".join(filter(str.isprintable, text))


def _shown(key: KeyRecord, now: float) -> Shown:
    state, created, expires = key.state(now), key.created_unix_s, key.expires_unix_s
    return Shown(key.id, key.name, key.owner, state, created, expires, key.limits, key.metrics)


def _words(key: Shown) -> str:
    if key.metrics:
        return "only /metrics"
    limits = key.limits
    words = [f"only {', '.join(limits.models)}"] if limits.models else []
    for value, what in (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.streams, "at a time"),
        (limits.memory_bytes, "bytes"),
    ):
        words += [f"{value} {what}"] if value else []
    if limits.priority_floor is not None:
        words.append(f"priority {limits.priority_floor} or more")
    return "; ".join(words) or "none"
