"""Kill each stage under load, and see what the clients see.

Streams run; a node is killed with SIGKILL; every stream is compared, token by token, with the same request on
the same cluster undisturbed. The headline is `pause`: the longest wait for a token of each stream around a kill, by
stream and, as `slowest_pause`, of the slowest stream of each kill. `next_token_gap` runs from the kill to a stream's
next token, which may already have been on its way. Each kill is told for itself, too: what the node did, and what the
slowest stream waited for (`Kill`).
The same is then done in `stop-restart` mode, in which an instance with a dead node is gone until it was restarted and
its requests begin again elsewhere.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field

from bench.cluster import generator, run_streams, running, wait_settled
from bench.contract import Result, percentile, progress
from controlplane.contract.events import Event, EventKind
from controlplane.contract.topology import Mode
from controlplane.kfadmin.client import EventRow
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from controlplane.kfadmin.local import LocalCluster

STREAMS = 16
TOKENS = 160
WINDOW_S = 30.0  # pauses that end later than this after a kill are not its doing


@dataclass(slots=True)
class Kill:
    """One kill as its slowest stream saw it. Seconds; the parts follow each other, from the kill on."""

    node: str
    role: str  # "scheduler", or which stage
    pause: float
    usual: float  # time between tokens before the kill
    ended: float  # from the kill to the end of that pause
    parts: dict[str, float] = field(default_factory=dict)
    tokens_recomputed: int = 0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in self.parts.items())
        return (
            f"killed {self.node} ({self.role}): longest pause of a stream {1e3 * self.pause:.0f} ms, over"
            f" {1e3 * self.ended:.0f} ms after the kill; a token takes {1e3 * self.usual:.1f} ms;"
            f" {parts} ms; {self.tokens_recomputed} tokens recomputed"
        )

    def row(self) -> dict[str, float | int | str]:
        parts = {f"{name}_s": round(seconds, 4) for name, seconds in self.parts.items()}
        return {
            "node": self.node,
            "role": self.role,
            "pause_s": round(self.pause, 4),
            "usual_s": round(self.usual, 4),
            "ended_s": round(self.ended, 4),
            **parts,
            "tokens_recomputed": self.tokens_recomputed,
        }


@dataclass
class Tally:
    gaps: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    slowest: list[float] = field(default_factory=list)  # of each kill
    each: list[Kill] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    lost: int = 0
    duplicated: int = 0
    different: int = 0
    failed: int = 0
    kills: int = 0
    survivor_restarts: int = 0


def run(quick: bool) -> Result:
    result = Result("recovery", settings={"streams": STREAMS, "max_tokens": TOKENS, "quick": quick})
    kills = [0, 5, 2, 7, 4, 1, 6, 3] * (1 if quick else 2)  # each node; one instance after the other
    with running(Mode.REPLICATE) as cluster:
        ours = _measure(cluster, [f"n{k}" for k in kills], survivors_stay=True)
    with running(Mode.STOP_RESTART) as cluster:
        baseline_kills = [f"n{k}" for k in (kills[1:3] if quick else kills[:8])]
        theirs = _measure(cluster, baseline_kills, survivors_stay=False)
    _fill(result.metrics, ours)
    within = sum(kill.pause <= 0.1 + 3 * kill.usual for kill in ours.each)
    result.metrics["kills_within_bar"] = within  # 0.1 s and three decode steps
    result.rows = [kill.row() for kill in ours.each]
    for name in ("detect", "plan", "watch", "connect", "restore", "first_token"):
        if ours.phases.get(name):
            result.measure(f"{name}_p50_s", ours.phases[name])
    _fill(result.baseline, theirs)
    # Of the pauses: the token after a kill is often one that the engine had sent before, in both modes.
    result.ratios["gap_p99"] = percentile(theirs.pauses, 0.99) / percentile(ours.pauses, 0.99)
    return result


def _fill(into: dict[str, float | int], tally: Tally) -> None:
    into |= {
        "kills": tally.kills,
        "streams": STREAMS * tally.kills,
        "pause_p50_s": percentile(tally.pauses, 0.5),
        "pause_p99_s": percentile(tally.pauses, 0.99),
        "slowest_pause_p50_s": percentile(tally.slowest, 0.5),
        "slowest_pause_max_s": max(tally.slowest, default=0.0),
        "next_token_gap_p50_s": percentile(tally.gaps, 0.5),
        "next_token_gap_p99_s": percentile(tally.gaps, 0.99),
        "tokens_lost": tally.lost,
        "tokens_duplicated": tally.duplicated,
        "tokens_different": tally.different,
        "streams_failed": tally.failed,
        "survivor_restarts": tally.survivor_restarts,
    }


def _measure(cluster: LocalCluster, victims: list[str], *, survivors_stay: bool) -> Tally:
    tally = Tally()
    prompts = sample_prompts(STREAMS, TOKENS)
    reference = run_streams(cluster, prompts)
    for number, victim in enumerate(victims):
        # Early, in the middle and late in the streams, in turn.
        after = (8, TOKENS // 2, TOKENS - 40)[number % 3]
        before = cluster.node_pids()
        roles = _roles(cluster)
        streams, killed_at, killed_unix = asyncio.run(_kill_under_load(cluster, prompts, victim, after))
        wait_settled(cluster)
        changed = {n for n, pid in cluster.node_pids().items() if before.get(n) != pid and n != victim}
        tally.kills += 1
        if survivors_stay:
            tally.survivor_restarts += len(changed)
        _compare(tally, streams, reference)
        gaps = [stream.next_token_gap_s(killed_at) for stream in streams]
        pauses = [stream.longest_pause(killed_at, WINDOW_S) for stream in streams]
        tally.gaps += [gap for gap in gaps if gap is not None]
        seen = [pause for pause in pauses if pause is not None]
        tally.pauses += [pause for pause, _ in seen]
        pause, ended = max(seen, default=(0.0, killed_at))
        kill = Kill(victim, roles[victim], pause, _usual(streams, killed_at), ended - killed_at)
        tally.slowest.append(pause)
        _phases(tally, kill, cluster, killed_unix)
        tally.each.append(kill)
        progress(f"  after {after} tokens {kill}")
    return tally


async def _kill_under_load(
    cluster: LocalCluster, prompts: list[Prompt], victim: str, after: int
) -> tuple[list[Stream], float, float]:
    streams = [Stream(prompt) for prompt in prompts]
    reached = asyncio.Event()

    def look(_: Stream) -> None:
        if sum(len(s.tokens) for s in streams) >= after * len(streams):
            reached.set()

    load = asyncio.create_task(generator(cluster).streams(prompts, streams, look))
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait({load, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if load.done():
        load.result()
        raise RuntimeError(f"the streams ended before the kill, at {after} tokens each")
    killed_at, killed_unix = time.monotonic(), time.time()
    cluster.kill(victim)
    return await load, killed_at, killed_unix


def _compare(tally: Tally, streams: list[Stream], reference: list[Stream]) -> None:
    for stream, expected in zip(streams, reference, strict=True):
        if stream.error:
            tally.failed += 1
        tally.lost += max(0, len(expected.tokens) - len(stream.tokens))
        tally.duplicated += max(0, len(stream.tokens) - len(expected.tokens))
        tally.different += sum(a != b for a, b in zip(stream.tokens, expected.tokens, strict=False))


def _roles(cluster: LocalCluster) -> dict[str, str]:
    with cluster.admin() as admin:
        pipelines = admin.status().pipelines
    return {
        member.node: f"stage {number}" if number else "scheduler"
        for pipeline in pipelines
        for number, stage in enumerate(pipeline.stages)
        for member in stage.serving
    }


def _usual(streams: list[Stream], until: float) -> float:
    """Time between tokens before then: the mean of each stream, the median over streams."""
    times = [[at for at in stream.times if at <= until] for stream in streams]
    means = [(some[-1] - some[0]) / (len(some) - 1) for some in times if len(some) > 1]
    return statistics.median(means) if means else 0.0


def _phases(tally: Tally, kill: Kill, cluster: LocalCluster, killed_unix: float) -> None:
    """From the event history: what part of the gap was spent where."""
    with cluster.admin() as admin:
        rows = [row for row in admin.events(limit=200) if row.event.unix_s >= killed_unix]
    died = _first(rows, EventKind.DIED, kill.node)
    if died is None:
        return
    detect = died.event.unix_s - killed_unix
    tally.phases.setdefault("detect", []).append(detect)
    kill.parts["detect"] = detect
    recovered = [
        row.event
        for row in rows
        if row.event.kind is EventKind.RECOVERED and not row.event.details.get("planned")
    ]
    kill.tokens_recomputed = sum(int(event.details["tokens_recomputed"]) for event in recovered)
    slowest = that_ended_before(recovered, killed_unix + kill.ended)
    for event in recovered:
        plan = next((_plan_s(row.event) for row in rows if _is_plan(row.event, event.subject)), None)
        parts = parts_of(event, killed_unix + detect, plan)
        for name, seconds in parts.items():
            tally.phases.setdefault(name, []).append(seconds)
        if event is slowest:
            kill.parts |= parts


def _is_plan(event: Event, pipeline: str) -> bool:
    return event.kind is EventKind.EPOCH and event.subject == pipeline and "plan_s" in event.details


def _plan_s(event: Event) -> float:
    return float(event.details["plan_s"])


def parts_of(recovered: Event, died_unix: float, plan_s: float | None) -> dict[str, float]:
    """What one pipeline's recovery was made of, after the death was known."""
    details = recovered.details
    parts = {} if plan_s is None else {"plan": plan_s}
    parts["watch"] = max(0.0, float(details["seen_unix_s"]) - died_unix - (plan_s or 0.0))
    names = [name for name in ("connect", "restore", "first_token") if f"{name}_s" in details]
    return parts | {name: max(0.0, float(details[f"{name}_s"])) for name in names}


def that_ended_before(recovered: list[Event], unix_s: float) -> Event | None:
    """The recovery that brought the token which came then: the one with the latest first token of those before it."""

    def first_token(event: Event) -> float:
        parts = ("seen_unix_s", "connect_s", "restore_s", "first_token_s")
        return sum(float(event.details.get(part, 0.0)) for part in parts)

    before = [event for event in recovered if first_token(event) <= unix_s]
    return max(before, key=first_token) if before else min(recovered, key=first_token, default=None)


def _first(rows: list[EventRow], kind: EventKind, subject: str) -> EventRow | None:
    return next((r for r in rows if r.event.kind is kind and r.event.subject == subject), None)
