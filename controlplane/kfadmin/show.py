"""Verbs that look: status, nodes, topology, events, incidents, audit, top, config."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from controlplane.contract.status import ClusterStatus, NodeStatus
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.formats import View, to_yaml
from controlplane.kfadmin.look import look, tail
from controlplane.kfadmin.output import (
    BAD,
    WARN,
    console,
    print_audit,
    print_events,
    print_incidents,
    print_nodes,
    print_protection,
    print_status,
    print_topology,
    progress,
    state,
    table,
)

SAMPLE_S = 1.0  # between the two statuses that rates are made from
KV_FULL = 0.9


def current(client: AdminClient) -> ClusterStatus:
    """The leader's status; where it is not the leader's, that is said."""
    status = client.current()
    if not status.leader:
        progress(f"nobody leads: {status.answered_by} tells what it knows")
    elif status.answered_by != status.leader:
        progress(
            f"{status.answered_by} answers, which does not lead: it may be a moment behind {status.leader}"
        )
    return status


@look
def status(client: AdminClient) -> View:
    """Is the cluster available, and what is wrong with it?"""
    answer = current(client)
    return View(answer, lambda _wide: print_status(answer), names=[answer.cluster])


@look
def nodes(client: AdminClient) -> View:
    """Every node: state, what it serves, how full its KV pool is."""
    found = current(client).nodes
    return View(found, lambda wide: print_nodes(found, wide), found, [node.node for node in found])


@look
def topology(client: AdminClient) -> View:
    """Who serves which stage of which pipeline, in which epoch, and where the replicas are."""
    answer = current(client)
    value = {"counter": answer.counter, "mode": answer.mode, "pipelines": answer.pipelines}
    names = [pipeline.id for pipeline in answer.pipelines]
    return View(value, lambda wide: print_topology(answer, wide), answer.pipelines, names)


@tail
def events(client: AdminClient, limit: int, after: int) -> View:
    """What happened: joined, suspected, died, recovered, drained ... with phases and durations."""
    rows = client.events(limit, after)
    return View(rows, lambda wide: print_events(rows, wide), rows, [str(row.id) for row in rows])


@look
def incidents(
    client: AdminClient,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest ones.")] = 20,
) -> View:
    """Each failure: its phases in seconds, what was chosen, how many streams it touched."""
    found = client.incidents(limit)
    return View(found, lambda wide: print_incidents(found, wide), found, [str(one.id) for one in found])


@look
def protection(client: AdminClient) -> View:
    """What protects the KV of requests, what that takes, and what the loss of each node would cost now."""
    current(client)
    found = client.protection()
    return View(
        found, lambda wide: print_protection(found, wide), found.losses, [one.node for one in found.losses]
    )


@tail
def audit(
    client: AdminClient,
    limit: int,
    after: int,
    operation: Annotated[str, typer.Option(help="Only what was done about the operation with this id.")] = "",
) -> View:
    """Who did what, from where, why, and in which epochs. `-o jsonl` exports it."""
    entries = client.audit(limit, after, operation)
    return View(entries, lambda wide: print_audit(entries, wide), entries, [str(one.id) for one in entries])


@look
def top(client: AdminClient) -> View:
    """How busy: requests of pipelines, steps each second and KV of nodes; the fullest first. Takes a second."""
    before, began = current(client), time.monotonic()
    time.sleep(SAMPLE_S)
    after = client.status()
    took_s = time.monotonic() - began
    known = {(node.node, node.incarnation): node for node in before.nodes}
    loads = [_load(node, known.get((node.node, node.incarnation)), took_s) for node in after.nodes]
    loads.sort(key=lambda load: (-float(load["kv"]), str(load["node"])))
    totals = {
        "running": sum(p.running for p in after.pipelines),
        "waiting": sum(p.waiting for p in after.pipelines),
    }
    pipelines = [{"pipeline": p.id, "running": p.running, "waiting": p.waiting} for p in after.pipelines]

    def draw(_wide: bool) -> None:
        out = console()
        out.print(f"{totals['running']} requests run, {totals['waiting']} wait")
        told = table("PIPELINE", "STATE", "RUNNING", "WAITING")
        for p in sorted(after.pipelines, key=lambda p: -(p.running + p.waiting)):
            told.add_row(p.id, state(p.state), str(p.running), str(p.waiting))
        out.print(told)
        out.print()
        rows = table("NODE", "SERVES", "STEPS/S", "KV", "OF WHICH REPLICAS", "SLOWNESS", "RANKS LOST")
        for load in loads:
            kv, slowness = float(load["kv"]), float(load["slowness"])
            rows.add_row(
                str(load["node"]), str(load["serves"]) or "-", f"{load['steps_per_s']:.1f}",
                Text(f"{kv:.0%}", WARN if kv >= KV_FULL else ""), f"{load['kv_replicas']:.0%}",
                Text(f"{slowness:.2f}", BAD if slowness >= 1 else ""), str(load["ranks_lost"] or "-"),
            )  # fmt: skip
        out.print(rows)

    value = {**totals, "pipelines": pipelines, "nodes": loads}
    return View(value, draw, loads, [str(load["node"]) for load in loads])


def _load(node: NodeStatus, before: NodeStatus | None, took_s: float) -> dict[str, str | float]:
    steps = 0 if before is None else max(0, node.progress - before.progress)
    total = node.blocks_total or 1
    return {
        "node": node.node,
        "serves": " ".join(node.serving),
        "steps_per_s": round(steps / took_s, 2),
        "kv": round((node.blocks_used + node.blocks_replica) / total, 4),
        "kv_replicas": round(node.blocks_replica / total, 4),
        "slowness": round(node.slowness, 4),
        "ranks_lost": node.counters.get("ranks_lost", 0),  # since its start
    }


@look
def config_show(client: AdminClient) -> View:
    """The settings that a controller runs with, without passwords."""
    current(client)
    settings = client.settings()
    items = [{"setting": name, "value": value} for name, value in settings.items()]
    return View(settings, lambda _wide: print(to_yaml(settings)), items, list(settings))
