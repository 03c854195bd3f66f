"""Verbs that look: status, nodes, topology, events."""

from __future__ import annotations

from typing import Annotated

import typer

from controlplane.kfadmin.output import (
    Output,
    OutputOption,
    print_events,
    print_json,
    print_nodes,
    print_status,
    print_topology,
)
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect


def status(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Is the cluster available, and what is wrong with it?"""
    with connect(run_dir, admin, token_file) as client:
        answer = client.status()
    print_json(answer) if output is Output.JSON else print_status(answer)


def nodes(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Every node: state, what it serves, how full its KV pool is."""
    with connect(run_dir, admin, token_file) as client:
        answer = client.status().nodes
    print_json(answer) if output is Output.JSON else print_nodes(answer)


def topology(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Who serves which stage of which pipeline, in which epoch, and where the replicas are."""
    with connect(run_dir, admin, token_file) as client:
        answer = client.status()
    if output is Output.JSON:
        print_json({"counter": answer.counter, "mode": answer.mode, "pipelines": answer.pipelines})
    else:
        print_topology(answer)


def events(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    output: OutputOption = Output.TABLE,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest ones.")] = 40,
    after: Annotated[int, typer.Option(min=0, help="Only those with a higher id.")] = 0,
) -> None:
    """What happened: joined, suspected, died, recovered, drained ... with phases and durations."""
    with connect(run_dir, admin, token_file) as client:
        rows = client.events(limit, after)
    print_json(rows) if output is Output.JSON else print_events(rows)
