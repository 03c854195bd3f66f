"""One failure as `bench protection` measures it: what `kfadmin protection` says it would cost, then the kill."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from bench.cluster import wait_settled
from bench.contract import progress
from bench.kevlarflow_check import Comparison, compare
from bench.kevlarflow_load import VOCABULARY, Outcome
from bench.protection_setup import Policy, load, requests_of
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.incidents import Incident
from controlplane.contract.protection import Loss
from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.client import AdminClient, Unreachable
from controlplane.kfadmin.local import LocalCluster

T = TypeVar("T")

WITHIN = 0.25  # of what was measured: how far a prediction may be off
POLL_S = 0.03
STILL_S = 0.4
BEGIN_LIMIT_S = 60.0
TOLD_LIMIT_S = 30.0  # after the streams have ended: the history has the recovery
# Output of a stream before the kill, at least, and by when its node is killed even if KV is not all protected yet.
READ_MIN, READ_MAX = 2, 16
TOKENS_AFTER = 8  # of output, behind READ_MAX: the kill is always within a stream


@dataclass(frozen=True, slots=True)
class Shape:
    """What runs when a node is killed, and which stage's node that is."""

    streams: int
    prompt_tokens: int
    stage: int


@dataclass(slots=True)
class Row:
    """One incident. Seconds from the kill to the next token of the slowest stream, predicted and measured."""

    policy: str
    shape: Shape
    victim: str
    streams: int  # that the node served
    tokens: int  # positions of the pipeline that had KV
    lag_tokens: int  # of them not protected yet, in full blocks, over all stages
    measured_s: float
    predicted_s: float | None  # None: nothing was said
    tokens_predicted: int  # to be computed again
    tokens_recomputed: int = 0
    restore_bytes: int = 0
    parts: dict[str, float] = field(default_factory=dict)  # of the history, in their order

    @property
    def within(self) -> bool:
        return (
            self.predicted_s is not None
            and abs(self.predicted_s - self.measured_s) <= WITHIN * self.measured_s
        )

    def told(self) -> dict[str, float | int | str]:
        """As a row of the result."""
        said = {} if self.predicted_s is None else {"predicted_s": round(self.predicted_s, 4)}
        return {
            "mode": self.policy,
            "streams": self.streams,
            "stage": self.shape.stage,
            "tokens": self.tokens,
            "lag_tokens": self.lag_tokens,
            **said,
            "measured_s": round(self.measured_s, 4),
            "within": int(self.within),
            "tokens_predicted": self.tokens_predicted,
            "tokens_recomputed": self.tokens_recomputed,
            "restore_bytes": self.restore_bytes,
            **{f"{name}_s": round(seconds, 4) for name, seconds in self.parts.items()},
        }

    def __str__(self) -> str:
        said = "nothing" if self.predicted_s is None else f"{self.predicted_s:.3f} s"
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.parts.items())
        return (
            f"{self.policy}, {self.streams} x {self.shape.prompt_tokens} tokens, stage {self.shape.stage}:"
            f" {self.measured_s:.3f} s, predicted {said}; {self.tokens_recomputed} computed again,"
            f" predicted {self.tokens_predicted}; {parts}"
        )


def incident(cluster: LocalCluster, policy: Policy, shape: Shape, seed: int) -> tuple[Row, Comparison]:
    """Load, prediction, kill; returns when all nodes are at home again. Raises KevlarFlowError if streams do not begin
    or the history does not tell of the failure."""
    wait_settled(cluster)
    with cluster.admin() as admin:
        last = max((one.id for one in admin.incidents(limit=1)), default=0)
        outcomes, row, killed = asyncio.run(_killed(cluster, admin, policy, shape, seed))
        found = _until(lambda: _over(admin, last), TOLD_LIMIT_S, "the history to tell of the failure")
    row.measured_s = slowest_s(outcomes, killed, row.streams)
    row.parts = parts_of(found)
    row.tokens_recomputed = sum(one.tokens_recomputed for one in found.affected)
    progress(f"  {row}")
    wait_settled(cluster)
    return row, compare(outcomes, policy.stages, VOCABULARY.stop)


async def _killed(
    cluster: LocalCluster, admin: AdminClient, policy: Policy, shape: Shape, seed: int
) -> tuple[list[Outcome], Row, float]:
    """The outcomes, the row as far as it is known before the kill, and when that was (monotonic seconds)."""
    requests = requests_of(shape.streams, shape.prompt_tokens, READ_MAX + TOKENS_AFTER, seed)
    running = asyncio.create_task(load(cluster, requests))
    try:
        row, killed = await asyncio.to_thread(_predict_and_kill, cluster, admin, policy, shape)
        outcomes = await running
        # A process is back in 0.2 s here, a machine is not: not while it is measured.
        cluster.release(row.victim)
        return outcomes, row, killed
    finally:
        running.cancel()


def _predict_and_kill(
    cluster: LocalCluster, admin: AdminClient, policy: Policy, shape: Shape
) -> tuple[Row, float]:
    def begun(read: int) -> ClusterStatus | None:
        status = admin.status()
        tokens = sum(pipeline.tokens for pipeline in status.pipelines)
        return status if tokens >= shape.streams * (shape.prompt_tokens + read) else None

    _until(lambda: begun(READ_MIN), BEGIN_LIMIT_S, f"{shape.streams} streams to begin")
    still(lambda: begun(READ_MAX) is not None or admin.protection().lag_tokens == 0, "KV to be protected")
    status = admin.status()
    pipeline = max(status.pipelines, key=lambda one: one.tokens)
    victim = pipeline.stages[shape.stage].serving[0].node
    said = admin.protection()
    loss = next((loss for loss in said.losses if loss.node == victim), Loss(victim))
    cluster.hold(victim)
    killed = time.monotonic()
    cluster.kill(victim)
    row = Row(
        policy.name,
        shape,
        victim,
        max(1, loss.streams),
        pipeline.tokens,
        said.lag_tokens,
        0.0,
        loss.wait_s,
        loss.tokens,
        restore_bytes=loss.restore_bytes,
    )
    return row, killed


def slowest_s(outcomes: Sequence[Outcome], killed: float, interrupted: int) -> float:
    """Seconds from the kill to the next token of the slowest of so many streams: those that waited longest.

    One token may have been on its way already: then it is the one behind it, for which the wait was longer."""
    waits = []
    for outcome in outcomes:
        after = [at for at in outcome.times if at > killed][:2]
        if after:
            waits.append(
                max((later - earlier, later - killed) for earlier, later in pairwise([killed, *after]))
            )
    if not waits:
        raise KevlarFlowError("no stream had a token after the kill: it came too late")
    return max(ended for _, ended in sorted(waits, reverse=True)[:interrupted])


def parts_of(found: Incident) -> dict[str, float]:
    """Of the pipeline that came back last."""
    one = found.slowest
    parts = {"detect": found.detect_s}
    if one is not None:
        for name in ("plan", "connect", "restore", "first_token"):
            seconds = getattr(one, f"{name}_s")
            if seconds is not None:
                parts[name] = seconds
    return parts


def _over(admin: AdminClient, last: int) -> Incident | None:
    """The failure that came after the one with the id `last`, once it is over."""
    try:
        incidents = admin.incidents()
    # On a busy machine its database answers late; whoever waits does so for a bounded time.
    except Unreachable:
        return None
    return next((one for one in incidents if one.id > last and one.affected and one.over), None)


def still(look: Callable[[], T], what: str) -> T:
    """What `look` says once that is something and has been the same for STILL_S: what nodes say of themselves is told
    ten times a second, and not at the same moment. Raises KevlarFlowError."""
    said, since = look(), time.monotonic()
    deadline = since + BEGIN_LIMIT_S
    while not said or time.monotonic() - since < STILL_S:
        time.sleep(POLL_S)
        if (now := look()) != said:
            said, since = now, time.monotonic()
        if time.monotonic() > deadline:
            raise KevlarFlowError(f"waited {BEGIN_LIMIT_S:g} s for {what}")
    return said


def _until(look: Callable[[], T | None], limit_s: float, what: str) -> T:
    """What `look` says, once that is something."""
    deadline = time.monotonic() + limit_s
    while True:
        if found := look():
            return found
        if time.monotonic() > deadline:
            raise KevlarFlowError(f"waited {limit_s:g} s for {what}")
        time.sleep(POLL_S)
