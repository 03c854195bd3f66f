"""`kfadmin demo`: open streams, kill the node that serves them, and show that nobody notices.

Each stream is compared with an undisturbed run of the same prompt and seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.client import AdminClient, Unreachable
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.loadgen import LoadGenerator, Stream, sample_prompts
from controlplane.kfadmin.output import BAD, GOOD, console, progress, table
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.target import RunDirOption, connect, find_run_dir

TOKENS_BEFORE_KILL = 16
REFRESH_S = 0.25
WARM_LIMIT_S = 60.0


class DemoStream(msgspec.Struct, frozen=True):
    """One stream's outcome."""

    stream: int
    tokens: int
    equal: bool
    longest_pause_s: float | None
    error: str


class DemoResult(msgspec.Struct, frozen=True):
    killed: str
    pid: int
    served: tuple[str, ...]
    streams: list[DemoStream]
    reference_s: float  # how long the undisturbed run took
    disturbed_s: float

    @property
    def ok(self) -> bool:
        return all(stream.equal for stream in self.streams)


def demo(
    run_dir: RunDirOption = None,
    output: OutputOption = Output.TABLE,
    streams: Annotated[int, typer.Option(min=1, max=64, help="How many to open.")] = 8,
    tokens: Annotated[int, typer.Option(min=32, max=4096, help="Length of each.")] = 192,
    node: Annotated[str | None, typer.Option(help="Which one to kill (default: a serving one).")] = None,
) -> None:
    """Kill a node under load and measure what the streams notice. Exit code 1 if any token differs."""
    local = find_run_dir(run_dir)
    with connect(local.path, None, None) as admin:
        result = asyncio.run(_demo(local, admin, streams, tokens, node))
    show(View(result, lambda _wide: _print_result(result), result.streams), output)
    raise typer.Exit(Exit.DONE if result.ok else Exit.FAILED)


async def _demo(local: RunDir, admin: AdminClient, count: int, tokens: int, node: str | None) -> DemoResult:
    status = admin.status()
    if node is not None:
        _victim(local, status, node)  # refuse before anything is started
    generator = LoadGenerator(
        local.endpoints().gateways[0], local.api_key(), status.model, ca=local.endpoints().ca
    )
    prompts = sample_prompts(count, tokens)
    progress(f"{count} streams of {tokens} tokens, undisturbed")
    before = time.monotonic()
    reference = await generator.streams(prompts)
    reference_s = time.monotonic() - before

    progress("the same again, and a kill -9 in the middle")
    before = time.monotonic()
    live = [Stream(prompt) for prompt in prompts]
    running = asyncio.create_task(generator.streams(prompts, live))
    try:
        await _all_under_way(live, running)
        status = await asyncio.to_thread(admin.status)
        victim = node or _busiest_node(status)
        pid, served = _victim(local, status, victim)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        progress(f"killed {victim} (pid {pid}), which served {', '.join(served) or 'nothing'}")
        await _show(live, running, killed_at)
        await running
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, KevlarFlowError):  # told by `await running` above
            await running
    outcomes = [
        DemoStream(index, len(got.tokens), got.same_as(wanted), got.longest_pause_s(killed_at), got.error)
        for index, (got, wanted) in enumerate(zip(live, reference, strict=True))
    ]
    return DemoResult(victim, pid, served, outcomes, reference_s, time.monotonic() - before)


async def _all_under_way(live: list[Stream], running: asyncio.Task[list[Stream]]) -> None:
    deadline = time.monotonic() + WARM_LIMIT_S
    while any(len(stream.tokens) < TOKENS_BEFORE_KILL for stream in live):
        if running.done():
            running.result()  # raises what went wrong
            raise KevlarFlowError("the streams ended too early: give more --tokens")
        if time.monotonic() > deadline:
            raise KevlarFlowError(
                f"not every stream had {TOKENS_BEFORE_KILL} tokens after {WARM_LIMIT_S:.0f} s"
            )
        await asyncio.sleep(0.01)


def _busiest_node(status: ClusterStatus) -> str:
    """A node in the middle of the pipeline with the most streams."""
    pipelines = [p for p in status.pipelines if p.stages and all(stage.serving for stage in p.stages)]
    if not pipelines:
        raise Unreachable("no pipeline serves")
    stages = max(pipelines, key=lambda p: p.running).stages
    return stages[len(stages) // 2].serving[0].node


def _victim(local: RunDir, status: ClusterStatus, node: str) -> tuple[int, tuple[str, ...]]:
    """Pid and duties of a node that may be killed: one of this very cluster, on this machine."""
    seen = next((n for n in status.nodes if n.node == node), None)
    if seen is None:
        raise typer.BadParameter(f"there is no node {node}", param_hint="--node")
    file = local.processes("nodes").get(node)
    if file is None or not file.alive or file.pid != seen.pid:
        raise ConfigError(
            f"{node} is not a running process of the cluster in {local.path}: nothing was killed"
        )
    return file.pid, seen.serving


async def _show(live: list[Stream], running: asyncio.Task[list[Stream]], killed_at: float) -> None:
    screen = Console(file=sys.stderr, markup=False, highlight=False)
    view = (
        Live(_progress_table(live, killed_at), console=screen, auto_refresh=False)
        if screen.is_terminal
        else None
    )
    with view or contextlib.nullcontext():
        while not running.done():
            await asyncio.wait([running], timeout=REFRESH_S if view else 1.0)
            if view:
                view.update(_progress_table(live, killed_at), refresh=True)
            else:
                progress(
                    f"{sum(s.done for s in live)} of {len(live)} done, {sum(len(s.tokens) for s in live)} tokens"
                )


def _progress_table(live: list[Stream], killed_at: float) -> Table:
    rows = table("STREAM", "TOKENS", "PAUSE", "TEXT")
    for index, stream in enumerate(live):
        rows.add_row(
            str(index), str(len(stream.tokens)), _ms(stream.longest_pause_s(killed_at)), _tail(stream.text)
        )
    return rows


def _print_result(result: DemoResult) -> None:
    out = console()
    rows = table("STREAM", "TOKENS", "LONGEST PAUSE", "AGAINST THE UNDISTURBED RUN")
    for s in result.streams:
        verdict = Text("equal", GOOD) if s.equal else Text(s.error or "DIFFERENT", BAD)
        rows.add_row(str(s.stream), str(s.tokens), _ms(s.longest_pause_s), verdict)
    out.print(rows)
    pauses = [s.longest_pause_s for s in result.streams if s.longest_pause_s is not None]
    equal = sum(s.equal for s in result.streams)
    out.print(
        f"\nkilled {result.killed} ({', '.join(result.served)}): {equal} of {len(result.streams)} streams are equal, "
        f"longest pause {_ms(max(pauses, default=None))}; "
        f"the run took {result.disturbed_s:.1f} s, undisturbed {result.reference_s:.1f} s"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"


def _tail(text: str, width: int = 60) -> str:
    return " ".join(text.split())[-width:]
