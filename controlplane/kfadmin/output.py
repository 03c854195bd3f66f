"""What kfadmin prints for people: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from controlplane.contract.audit import AuditEntry
from controlplane.contract.incidents import Incident
from controlplane.contract.protection import Protection
from controlplane.contract.records import Operation, OperationState
from controlplane.contract.status import (
    Check,
    ClusterStatus,
    NodeState,
    NodeStatus,
    PipelineState,
    StageStatus,
    mixtures,
    near_copies,
    numerics_of_stages,
    who_has_what,
)
from controlplane.kfadmin.client import EventRow

SHOWN_MAX = 40  # lines of a kind in a status; what is wrong goes first
PIPE_WIDTH = 200  # columns when stdout is not a terminal: tables are for reading, not for wrapping

GOOD, WARN, BAD, DIM = "green", "yellow", "bold red", "dim"
STYLES = {
    NodeState.GREEN: GOOD, NodeState.YELLOW: WARN, NodeState.RED: BAD, NodeState.ABSENT: BAD,
    PipelineState.UP: GOOD, PipelineState.DEGRADED: WARN, PipelineState.MOVING: WARN,
    PipelineState.DOWN: BAD, PipelineState.FORMING: WARN,
    OperationState.RUNNING: WARN, OperationState.DONE: GOOD,
    OperationState.FAILED: BAD, OperationState.CANCELLED: DIM,
}  # fmt: skip


def printable(text: str) -> str:
    """Without what a terminal would obey: names, reasons and messages come from others, and from older releases."""
    return text if text.isprintable() else "".join(filter(_is_shown, text))


def _is_shown(char: str) -> bool:
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs")


class _Plain(Console):
    """rich styles what it is given and lets escape sequences in it through."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def console() -> Console:
    """For data."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return _Plain(markup=False, highlight=False, width=width)


def progress(line: str) -> None:
    """One line for people, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def table(*headers: str) -> Table:
    return Table(*headers, box=None, pad_edge=False, header_style="bold")


def state(value: NodeState | PipelineState | OperationState) -> Text:
    return Text(value.value, STYLES[value])


def clock(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s)) if unix_s else "-"


def print_status(status: ClusterStatus) -> None:
    """Availability first, then what is wrong, then the rest."""
    out = console()
    serves = Text("available", GOOD) if status.available else Text("UNAVAILABLE", BAD)
    out.print(
        Text(f"{status.cluster}/{status.group}  {status.model}  mode {status.mode.value}  ").append(serves)
    )
    out.print(
        f"epoch counter {status.counter}, leader {status.leader or 'none'}, answered by {status.answered_by}, "
        f"etcd heard {status.etcd_age_s:.1f} s ago"
    )
    for what in (*status.troubles, *status.blemishes):
        out.print(Text(what, BAD))
    for what in (*mixtures(status), *near_copies(status)):
        out.print(Text(what, WARN))
    if status.paused:
        out.print(Text("automation is PAUSED: nothing is repaired or moved until `kfadmin resume`", BAD))
    out.print()
    pipelines = table("PIPELINE", "STATE", "EPOCH", "RUNNING", "WAITING", "STAGES", "REPLICA LAG")
    told = status.pipelines
    if len(told) > SHOWN_MAX:  # what is as it should be would hide what is not
        told = tuple(p for p in told if p.state is not PipelineState.UP)
    for p in told[:SHOWN_MAX]:
        stages = "  ".join(_served_by(stage) for stage in p.stages)
        lags = " ".join("-" if stage.lag_tokens < 0 else str(stage.lag_tokens) for stage in p.stages)
        closing = state(p.state).append(" closing", WARN) if p.closing else state(p.state)
        pipelines.add_row(p.id, closing, str(p.epoch), str(p.running), str(p.waiting), stages, lags)
    if told:
        out.print(pipelines)
    if others := len(status.pipelines) - len(told[:SHOWN_MAX]):
        up = sum(p.state is PipelineState.UP for p in status.pipelines)
        out.print(f"{others} pipelines are not shown ({up} are up): `kfadmin topology` shows all")
    trouble = [node for node in status.nodes if node.state is not NodeState.GREEN or _mark(node)]
    green = sum(node.state is NodeState.GREEN for node in status.nodes)
    out.print(f"\n{green} of {len(status.nodes)} nodes are green")
    for stage, having in numerics_of_stages(status).items():
        out.print(f"stage {stage} computes as {who_has_what(having)}")
    for node in trouble[:SHOWN_MAX]:
        marked = f"{_mark(node)}  {node.evidence}"
        out.print(Text(f"  {node.node} ").append(state(node.state)).append(marked))
    if len(trouble) > SHOWN_MAX:
        out.print(f"  and {len(trouble) - SHOWN_MAX} more: `kfadmin nodes` shows all")
    for operation in status.operations:
        if operation.open:
            what = f"{operation.kind.value} {operation.node or operation.instances or ''}".rstrip()
            out.print(f"operation {operation.id}: {what}: {operation.message}")


def _mark(node: NodeStatus) -> str:
    return f"{' cordoned' * node.cordoned}{' leaving' * node.leaving}"


def _served_by(stage: StageStatus) -> str:
    nodes = ",".join(member.node for member in stage.serving) or "nobody"
    return f"{nodes} (for {','.join(stage.homes)})" if stage.borrowed else nodes


def print_checks(checks: tuple[Check, ...]) -> None:
    out = console()
    width = max((len(check.name) for check in checks), default=0)
    styles = {"ok": GOOD, "warn": WARN, "fail": BAD}
    for check in checks:
        level = Text(f"  {check.level:<5}", styles.get(check.level, ""))
        out.print(level.append(f" {check.name:<{width}}  {check.message}", "default"))


def print_nodes(nodes: tuple[NodeStatus, ...], wide: bool = False) -> None:
    headers = (
        "NODE",
        "STATE",
        "STAGE",
        "SERVES",
        "KV OWN",
        "KV REPLICA",
        "KV TOTAL",
        "NUMERICS",
        "PID",
        "EVIDENCE",
    )
    more = ("WHERE", "VERSION", "SETTINGS", "RPC", "LINK", "SILENT", "SLOWNESS") if wide else ()
    rows = table(*headers, *more)
    for n in nodes:
        marked = state(n.state).append(_mark(n), WARN)
        blocks = (str(n.blocks_used), str(n.blocks_replica), str(n.blocks_total))
        stage = str(n.stage) if n.stage >= 0 else "-"
        process = (n.numerics or "-", str(n.pid or "-"))
        told = (
            "/".join(value for label, value in n.fault_domain.items() if label != "node"),
            n.version,
            n.settings,
            n.rpc_address,
            n.link_address,
            f"{n.silent_s:.2f} s",
            f"{n.slowness:.2f}",
        )
        also = (item or "-" for item in told) if wide else ()
        rows.add_row(n.node, marked, stage, " ".join(n.serving) or "-", *blocks, *process, n.evidence, *also)
    console().print(rows)


def print_topology(status: ClusterStatus, wide: bool = False) -> None:
    console().print(f"epoch counter {status.counter}, mode {status.mode.value}")
    rows = table(
        "PIPELINE",
        "EPOCH",
        "STAGE",
        "HOME",
        "SERVED BY",
        "REPLICAS",
        "LAG",
        "MOVE",
        *(("RUNNING", "WAITING") if wide else ()),
    )
    for p in status.pipelines:
        for index, stage in enumerate(p.stages):
            move = p.move if p.move is not None and p.move.stage == index else None
            who = Text(", ".join(map(str, stage.serving)) or "nobody", WARN if stage.borrowed else "")
            rows.add_row(
                p.id if index == 0 else "", str(p.epoch) if index == 0 else "", str(index),
                ", ".join(stage.homes), who, ", ".join(map(str, stage.replicas)) or "-",
                str(stage.lag_tokens) if stage.lag_tokens >= 0 else "-",
                f"{move.phase.value} to {move.to} ({move.reason})" if move else "",
                *((str(p.running), str(p.waiting)) if wide and index == 0 else ("", "") if wide else ()),
            )  # fmt: skip
    console().print(rows)


def print_events(rows: Sequence[EventRow], wide: bool = False) -> None:
    out = table("ID", "WHEN", "KIND", "SUBJECT", "EPOCH", "WHAT")
    for row in rows:
        e = row.event
        phases = " ".join(
            f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in e.details.items()
        )
        what = f"{e.message}  {phases}".rstrip()
        out.add_row(str(row.id), clock(e.unix_s), e.kind.value, e.subject, str(e.epoch or "-"), what)
    console().print(out)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_incidents(found: Sequence[Incident], wide: bool = False) -> None:
    """One row for each failure; phases are of the pipeline that came back last."""
    phases = ("DETECT", "PLAN", "CONNECT", "RESTORE", "FIRST TOKEN")
    out = table(
        "ID", "BEGAN", "NODE", *phases, "TOTAL", "STREAMS", "CHOSEN", *(("CAUSE", "EPOCHS") if wide else ())
    )
    for one in found:
        last = one.slowest
        if last is None:
            spent, total = ["-"] * 4, Text("served nothing", DIM)
            chosen = ["-"]
        else:
            spent = [seconds(s) for s in (last.plan_s, last.connect_s, last.restore_s, last.first_token_s)]
            total = Text(seconds(one.ended_unix_s - one.began_unix_s)) if one.over else Text("goes on", BAD)
            chosen = [f"{a.pipeline}: {'nobody is left' if a.down else a.chosen}" for a in one.affected]
        more = (one.cause, " ".join(str(a.epoch) for a in one.affected) or "-") if wide else ()
        row = (str(one.id), clock(one.began_unix_s), one.node, seconds(one.detect_s), *spent)
        out.add_row(*row, total, str(one.streams), "; ".join(chosen), *more)
    console().print(out)


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    value, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def print_protection(found: Protection, wide: bool = False) -> None:
    """The group in two lines, then a row for each node, the most expensive first."""
    out = console()
    out.print(f"{found.group}  mode {found.mode.value}  {found.policy}")
    share = found.protected_bytes / found.kv_bytes if found.kv_bytes else 1.0
    out.print(
        f"{size(found.kv_bytes)} of KV, {share:.0%} protected by {size(found.spent_bytes)}; "
        f"{found.lag_tokens} tokens of full blocks are behind, {found.tail_tokens} are in blocks that are not full"
    )
    if found.overhead_s is None:
        out.print("no failure has been measured lately: how long one takes to be found is not known")
    else:
        out.print(
            f"{found.overhead_s:.3f} s to find a failure and connect anew: median of {found.measured} of late"
        )
    if found.restoring.block_s:
        speed = found.restoring
        out.print(f"{1e3 * speed.block_s:.2f} ms to restore a block, and {speed.wait_s:.3f} s for the first")
    out.print()
    rows = table(
        "NODE", "SERVES", "STREAMS", "TO COMPUTE", "TO RESTORE", "WAIT", "HOLDS FOR OTHERS", *(("HOW",) if wide else ())
    )  # fmt: skip
    dearest = sorted(found.losses, key=lambda one: (not one.down, -(one.wait_s or 0.0), -one.tokens))
    for one in dearest if wide else dearest[:SHOWN_MAX]:
        wait = Text(f"{', '.join(one.down)} DOWN", BAD) if one.down else Text(seconds(one.wait_s))
        rows.add_row(
            one.node, " ".join(one.serves) or "-", str(one.streams), str(one.tokens), size(one.restore_bytes), wait,
            size(one.exposed_bytes), *(("; ".join(one.how) or "-",) if wide else ()),
        )  # fmt: skip
    out.print(rows)
    if not wide and len(dearest) > SHOWN_MAX:
        out.print(f"and {len(dearest) - SHOWN_MAX} more: -o wide shows all")


def print_audit(entries: Sequence[AuditEntry], wide: bool = False) -> None:
    more = ("OPERATION", "ROLE", "RECORDED BY") if wide else ()
    out = table("ID", "WHEN", "WHO", "FROM", "ACTION", "WHAT", "EPOCHS", "REASON", "MESSAGE", *more)
    for one in entries:
        what = " ".join(filter(None, (one.kind, one.node, one.substitute and f"with {one.substitute}")))
        epochs = f"{one.epoch_before} -> {one.epoch_after}"
        also = (one.operation, one.role, one.recorded_by) if wide else ()
        out.add_row(
            str(one.id), clock(one.unix_s), one.who or "-", one.address or "-", one.action.value, what,
            epochs, one.reason or "-", one.message or "-", *also,
        )  # fmt: skip
    console().print(out)


def print_operations(operations: Sequence[Operation], wide: bool = False) -> None:
    more = ("BEGAN", "ENDED", "DEADLINE") if wide else ()
    out = table("ID", "KIND", "NODE", "STATE", "MESSAGE", *more)
    for op in operations:
        times = (op.created_unix_s, op.finished_unix_s, op.deadline_unix_s)
        also = [clock(at) for at in times] if wide else []
        node = f"{op.node} with {op.substitute}" if op.substitute else op.node or "-"
        out.add_row(op.id, op.kind.value, node, state(op.state), op.message, *also)
    console().print(out)
