"""Clusters, histories and figures to show: of a failure, and of an hour."""

from __future__ import annotations

import time

import msgspec

from controlplane.contract.events import Event, EventKind
from controlplane.contract.figures import Figures
from controlplane.contract.ids import Member
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.contract.topology import Move
from tests.web.admin_service import healthy

replace = msgspec.structs.replace


def broken() -> ClusterStatus:
    """One node dead and its stage borrowed, one pipeline without a node for a stage, one move under way."""
    status = healthy(instances=3)
    p0, p1, p2 = status.pipelines
    borrowed = replace(
        p0.stages[1], serving=(Member("n5", "aaaa"),), borrowed=True, replicas=(), lag_tokens=-1
    )
    p0 = replace(p0, state=PipelineState.DEGRADED, epoch=14, stages=(p0.stages[0], borrowed, *p0.stages[2:]))
    move = Move(stage=3, to=Member("n3", "bbbb"), reason="op-7")
    lagging = replace(p1.stages[2], lag_tokens=48)
    p1 = replace(p1, state=PipelineState.MOVING, move=move, stages=(*p1.stages[:2], lagging, p1.stages[3]))
    nobody = replace(p2.stages[0], serving=(), replicas=(), lag_tokens=-1)
    p2 = replace(p2, state=PipelineState.DOWN, running=0, waiting=3, stages=(nobody, *p2.stages[1:]))
    nodes = list(status.nodes)
    nodes[1] = replace(
        nodes[1], state=NodeState.RED, evidence="its report stream broke, n2's link to it broke", serving=()
    )
    nodes[5] = replace(nodes[5], serving=("p1/1", "p0/1"), blocks_used=900, blocks_replica=800)
    nodes[6] = replace(nodes[6], state=NodeState.YELLOW, evidence="silent for 0.8 s", silent_s=0.8)
    nodes[7] = replace(nodes[7], cordoned=True)
    nodes[8] = replace(nodes[8], state=NodeState.ABSENT, evidence="never registered", serving=(), pid=0)
    return replace(status, counter=14, nodes=tuple(nodes), pipelines=(p0, p1, p2))


def events(ago_s: float = 9.0) -> list[Event]:
    """A failure with all its phases, as controllers tell of it."""
    now = time.time() - ago_s
    died = {"silent_s": 0.021, "evidence": "report stream and link", "incarnation": "aaaa"}
    phases = {"connect_s": 0.034, "restore_s": 0.12, "first_token_s": 0.29, "seen_unix_s": now + 0.1}
    return [
        Event(EventKind.LEADER, "c1", "c1 leads", now - 90),
        Event(EventKind.JOINED, "n1", "n1 is ready for stage 1", now - 80),
        Event(EventKind.DIED, "n1", "n1 is dead", now, 13, died),
        Event(
            EventKind.EPOCH,
            "p0",
            "p0: stage 1: n1 -> n5",
            now + 0.1,
            14,
            {"plan_s": 0.012, "died": "n1@aaaa"},
        ),
        Event(
            EventKind.RECOVERED,
            "p0",
            "p0 serves again",
            now + 0.4,
            14,
            {**phases, "requests": 8, "tokens_recomputed": 57},
        ),
    ]


def figures(rows: int = 60, every_s: float = 5.0) -> list[Figures]:
    now = time.time()
    return [
        Figures(
            unix_s=now - every_s * (rows - k),
            running=8 + k % 5,
            waiting=k % 3,
            blocks_used=3000 + k,
            blocks_replica=2500,
            blocks_total=16384,
            tokens_per_s=800.0 + 10 * (k % 7),
            cache_hit_ratio=0.31,
            first_token_p50_s=0.081,
            first_token_p99_s=0.21,
            inter_token_p50_s=0.011,
            inter_token_p99_s=0.034,
        )
        for k in range(rows)
    ]
