"""`kfadmin chaos`: run a game day, or show what one would do."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.text import Text

from controlplane.contract.errors import RequestError
from controlplane.kfadmin.chaos.page import page
from controlplane.kfadmin.chaos.perform import Performer
from controlplane.kfadmin.chaos.plan import Plan, Role, drawn, load_plan, role_of
from controlplane.kfadmin.chaos.play import Player
from controlplane.kfadmin.chaos.report import Report
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.output import BAD, GOOD, console, progress, seconds, table
from controlplane.kfadmin.target import RunDirOption, connect, find_run_dir
from controlplane.kfadmin.tokens import seconds_of

RANDOM_S = "10m"
app = typer.Typer(no_args_is_help=True, help="Game days: faults on a schedule, under a load that is checked.")


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="The plan (TOML): docs/game-days.md.")] = None,
    run_dir: RunDirOption = None,
    output: OutputOption = Output.TABLE,
    random_: Annotated[bool, typer.Option("--random", help="Draw the faults instead.")] = False,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for", help=f"How long: 90s, 10m. Default: until all faults are over; --random: {RANDOM_S}."
        ),
    ] = None,
    every: Annotated[
        float, typer.Option(min=1.0, help="Seconds between faults of --random, on average.")
    ] = 20.0,
    seed: Annotated[
        int | None, typer.Option(help="What is drawn, is drawn by it; the report has it.")
    ] = None,
    max_unavailable: Annotated[
        int | None,
        typer.Option(min=1, help="Processes at any time, those included that are away anyhow. Default: 1."),
    ] = None,
    pause_max: Annotated[
        float | None, typer.Option(help="Seconds of a stream without a token that end the day. Default: 10.")
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, max=1024, help="At a time. Default: 8.")] = None,
    tokens: Annotated[int | None, typer.Option(min=16, help="Of each stream. Default: 192.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there, too.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the report there, as a page.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; do nothing.")] = False,
) -> None:
    """Break processes of a `kfadmin up` cluster of this machine, one after another, and check every stream.

    It waits until all is home before each fault, and ends itself when a stream suffers: an error, another token than
    without the fault, a pause over the limit. Then, and at Ctrl-C, what it has broken is mended. Exit codes: 0 nothing
    suffered; 1 something did, or it was called off; 3 the cluster was not home, and nothing was done.
    """
    if (file is None) != random_:
        raise RequestError("give a plan's FILE, or --random")
    local = find_run_dir(run_dir)
    with connect(local.path, None, None) as admin:
        names = Performer(local, admin).names()
    given: dict[str, Any] = {
        "for_s": float(seconds_of(for_)) if for_ else None, "max_unavailable": max_unavailable, "streams": streams,
        "pause_max_s": pause_max, "tokens": tokens, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if random_:
        given = {"for_s": float(seconds_of(RANDOM_S)), "seed": random.randrange(1 << 31), **given}
        given["faults"] = drawn(given["seed"], given["for_s"], every, names)
    plan = load_plan(file, given)
    _targets_exist(plan, names)
    if dry_run:
        show(View(plan, lambda _wide: _print_plan(plan), plan.faults), output)
        return
    writable = [path for path in (json_file, html_file) if path is not None]
    for path in writable:
        path.touch()  # an hour later is too late to learn that it cannot be written
    report = asyncio.run(Player(local, plan).play())
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if html_file is not None:
        html_file.write_text(page(report))
    show(View(report, lambda wide: print_report(report, wide), report.streams), output)
    raise typer.Exit(Exit.DONE if report.ok else Exit.FAILED)


def _targets_exist(plan: Plan, names: list[str]) -> None:
    for number, fault in enumerate(plan.faults, 1):
        role = Role.CONTROLLER if fault.target == Role.LEADER else fault.target
        if not any(role in (name, role_of(name)) for name in names):
            raise RequestError(f"fault {number}: there is no {fault.target}; there are {', '.join(names)}")


def _print_plan(plan: Plan) -> None:
    out = table("AT", "FAULT", "TARGET", "FOR")
    for fault in plan.faults:
        out.add_row(f"{fault.at_s:.1f} s", fault.kind.value, fault.target, f"{fault.for_s:.1f} s")
    console().print(out)
    console().print(
        f"{len(plan.faults)} faults, at most {plan.max_unavailable} unavailable, seed {plan.seed}; "
        f"{plan.streams} streams of {plan.tokens} tokens, pauses of {plan.pause_max_s:g} s at most"
    )


def print_report(report: Report, wide: bool = False) -> None:
    """As a table for people."""
    out = console()
    rows = table(
        "FAULT",
        "KIND",
        "TARGET",
        "BEGAN",
        "LASTED",
        "HOME AFTER",
        "STREAMS",
        "MEDIAN PAUSE",
        "LONGEST PAUSE",
        "OUTCOME",
    )
    for one in report.faults:
        phases = ", ".join(f"{name} {spent:.3f}" for name, spent in one.phases.items())
        told = " ".join(filter(None, [one.outcome, one.said, f"({phases})" if phases else ""]))
        rows.add_row(
            str(one.number), one.kind, one.target, seconds(one.began_s), seconds(one.lasted_s), seconds(one.home_s),
            str(one.streams), seconds(one.pause_median_s), seconds(one.pause_max_s), told,
        )  # fmt: skip
    out.print(rows)
    shown = [one for one in report.streams if wide or one.error or not one.equal]
    if shown:
        checked = table(
            "STREAM", "SEED", "BEGAN", "TOKENS", "LONGEST PAUSE", "RESUMES", "AGAINST ITS REFERENCE"
        )
        for stream in shown:
            verdict = Text("equal", GOOD) if stream.equal else Text(stream.error or "DIFFERENT", BAD)
            checked.add_row(
                str(stream.number), str(stream.seed), seconds(stream.began_s), str(stream.tokens),
                seconds(stream.pause_max_s), str(stream.resumes), verdict,
            )  # fmt: skip
        out.print()
        out.print(checked)
    over = sum(one.outcome == "home" for one in report.faults)
    verdict = Text("PASSED", GOOD) if report.ok else Text(f"FAILED: {report.why}", BAD)
    out.print()
    out.print(
        Text(
            f"{over} of {len(report.faults)} faults came and were mended; {len(report.streams)} streams of "
            f"{report.tokens} tokens were checked, {report.different} differ; longest pause while nothing was broken "
            f"{seconds(report.calm_pause_max_s)} s; seed {report.plan.seed}  "
        ).append(verdict)
    )
    if not report.ok:
        progress(f"kfadmin: {report.why}")
