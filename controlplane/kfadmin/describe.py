"""`kfadmin describe`: all that is known of one node, pipeline or request, with what happened to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from controlplane.contract.errors import RequestError
from controlplane.contract.records import Operation
from controlplane.kfadmin.client import AdminClient, EventRow
from controlplane.kfadmin.formats import View
from controlplane.kfadmin.lives import print_life
from controlplane.kfadmin.look import look
from controlplane.kfadmin.output import console, print_events, print_operations, progress, table
from controlplane.kfadmin.show import current

EVENTS_SEARCHED = 1000
EVENTS_SHOWN = 20

app = typer.Typer(no_args_is_help=True, help="All that is known of one thing.")


@app.command()
@look
def node(client: AdminClient, name: Annotated[str, typer.Argument(help="The node, such as n2.")]) -> View:
    """One node: process, health, what it serves and copies, what it may do, and what happened to it."""
    status = current(client)
    found = next((one for one in status.nodes if one.node == name), None)
    if found is None:
        raise RequestError(f"there is no node {name}; `kfadmin nodes` names them")
    homes = [
        f"{p.id}/{i}" for p in status.pipelines for i, stage in enumerate(p.stages) if name in stage.homes
    ]
    copies = [
        f"{p.id}/{i}"
        for p in status.pipelines
        for i, stage in enumerate(p.stages)
        if any(member.node == name for member in stage.replicas)
    ]
    operations = [op for op in status.operations if name in (op.node, op.substitute) or _is_target(op, name)]
    rows = _about(client, name)
    value = {"node": found, "homes": homes, "copies": copies, "operations": operations, "events": rows}

    def draw(wide: bool) -> None:
        facts = msgspec.to_builtins(found) | {"homes": homes, "copies": copies}
        if not wide:
            counters = facts.pop("counters")
            if counters.get("parity_bytes") or counters.get("parity_lag_blocks"):
                facts |= {name: counters[name] for name in ("parity_bytes", "parity_lag_blocks")}
            if lost := counters.get("ranks_lost"):
                facts["ranks_lost"] = lost
        _draw(facts, operations, rows, wide)

    return View(value, draw, names=[name])


@app.command()
@look
def pipeline(client: AdminClient, name: Annotated[str, typer.Argument(help="Such as p0.")]) -> View:
    """One pipeline: who serves each stage, copies and how far they are behind, its move, what happened to it."""
    status = current(client)
    found = next((one for one in status.pipelines if one.id == name), None)
    if found is None:
        raise RequestError(f"there is no pipeline {name}; `kfadmin topology` names them")
    members = {member.node for stage in found.stages for member in (*stage.serving, *stage.replicas)}
    members |= {home for stage in found.stages for home in stage.homes}
    operations = [op for op in status.operations if op.open and {op.node, op.substitute} & members]
    rows = _about(client, name)
    incidents = [one for one in client.incidents(1000) if any(a.pipeline == name for a in one.affected)]
    value = {"pipeline": found, "operations": operations, "incidents": incidents, "events": rows}

    def draw(wide: bool) -> None:
        facts = msgspec.to_builtins(found)
        for index, stage in enumerate(facts.pop("stages")):
            serving = ", ".join(f"{m['node']}@{m['incarnation']}" for m in stage["serving"]) or "nobody"
            copies = ", ".join(m["node"] for m in stage["replicas"]) or "no copy"
            lag = f", {stage['lag_tokens']} tokens behind" if stage["lag_tokens"] >= 0 else ""
            home = ", ".join(stage["homes"])
            facts[f"stage {index}"] = f"{serving} (home {home}; copies on {copies}{lag})"
        facts["incidents"] = len(incidents)
        _draw(facts, operations, rows, wide)

    return View(value, draw, names=[name])


@app.command()
@look
def request(
    client: AdminClient,
    name: Annotated[str, typer.Argument(metavar="ID", help="As in its answer, or X-Request-Id.")],
) -> View:
    """The life of one request: where it waited and ran, every pause with its cause, its end. Gateways remember the last
    4,096 each."""
    found = client.lives(name)
    if not found.lives:
        silent = f" (no answer from {', '.join(found.silent)})" if found.silent else ""
        raise RequestError(f"no gateway remembers a request {name}{silent}")
    incidents = {
        (one.pipeline, one.epoch): incident.id
        for incident in client.incidents(1000)
        for one in incident.affected
    }
    value = {"request": found.request, "lives": found.lives, "silent": found.silent}

    def draw(_wide: bool) -> None:
        for life in found.lives:
            print_life(life, incidents)
        if found.silent:
            progress(f"no answer from {', '.join(found.silent)}: there may be more")

    return View(value, draw, found.lives, [name])


def _is_target(op: Operation, name: str) -> bool:
    return op.open and any(target.member.node == name for target in op.targets)


def _about(client: AdminClient, name: str) -> list[EventRow]:
    """The newest events about a node or a pipeline, oldest first."""
    return [row for row in client.events(EVENTS_SEARCHED) if row.event.subject == name][-EVENTS_SHOWN:]


def _draw(
    facts: dict[str, object], operations: Sequence[Operation], rows: Sequence[EventRow], wide: bool
) -> None:
    out = console()
    told = table("", "")
    told.show_header = False
    for name, value in facts.items():
        told.add_row(name.replace("_", " "), _words(value))
    out.print(told)
    if operations:
        out.print()
        print_operations(operations, wide)
    if rows:
        out.print()
        print_events(rows, wide)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_words(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value) or "-"
    return "-" if value in ("", None) else f"{value:.3f}" if isinstance(value, float) else str(value)
