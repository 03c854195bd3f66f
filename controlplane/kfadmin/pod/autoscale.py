"""How many instances a group should have, by its queue and its KV, and how many pods that takes.

Level-triggered: each look at the cluster gives the same answer for the same state, and a look that comes to nothing is
made up for by the next one. `kfadmin pod autoscale` acts on it; a CronJob of the chart calls that every minute.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from controlplane.contract.errors import RequestError
from controlplane.contract.hosting import number_of
from controlplane.contract.records import OperationKind, OperationState
from controlplane.contract.status import ClusterStatus, NodeState

GIVEN_UP = (OperationState.FAILED, OperationState.CANCELLED)
# Pods may have to wait for machines, images and weights. Streams that last longer than this end all the same: a
# pipeline that is closing goes without the operation.
DEADLINE_S = 1800.0


@dataclass(frozen=True, slots=True)
class Rules:
    """`waiting`: queued requests of an instance from which on there should be one more. `kv_high`, `kv_low`: share of
    the serving nodes' KV blocks that requests have; above the one there should be an instance more, below the other one
    less, if what is there fits into the rest below `kv_high`. `calm_s`: since the last change, before one goes, and
    since one that failed or was cancelled, before anything is asked for."""

    instances_min: int
    instances_max: int
    waiting: float = 4.0
    kv_high: float = 0.8
    kv_low: float = 0.3
    calm_s: float = 600.0

    def __post_init__(self) -> None:
        """Raises RequestError."""
        if not 1 <= self.instances_min <= self.instances_max:
            raise RequestError(
                f"{self.instances_min} to {self.instances_max} instances: 1 or more, the lower first"
            )
        if not 0 <= self.kv_low < self.kv_high <= 1 or self.waiting <= 0:
            raise RequestError(
                f"KV from {self.kv_low} to {self.kv_high} and {self.waiting} waiting: 0 <= low < high <= 1, and more"
                " than none"
            )


@dataclass(frozen=True, slots=True)
class Decision:
    instances: int  # wanted
    now: int
    why: str  # in words; of what stays as well
    scaling: bool = False  # an operation of this kind is under way: nothing is asked for

    @property
    def changes(self) -> bool:
        return self.instances != self.now and not self.scaling


def decide(status: ClusterStatus, rules: Rules, now_unix_s: float) -> Decision:
    """One instance more or less at a time; straight back between the bounds."""
    now = sum(not pipeline.closing for pipeline in status.pipelines)
    scaling = [op for op in status.operations if op.kind is OperationKind.SCALE and op.open]
    if not now:
        return Decision(now, now, "there is no topology yet")
    if scaling:
        return Decision(now, now, f"{scaling[0].id} is under way", scaling=True)
    if status.paused:
        return Decision(now, now, "automation is paused")
    given_up_s = _since(status, GIVEN_UP, now_unix_s)
    if given_up_s < rules.calm_s:
        return Decision(now, now, f"the last change was given up {given_up_s:.0f} s ago")
    if not rules.instances_min <= now <= rules.instances_max:
        bound = min(max(now, rules.instances_min), rules.instances_max)
        return Decision(bound, now, f"{now} is not within {rules.instances_min} to {rules.instances_max}")
    waiting = sum(pipeline.waiting for pipeline in status.pipelines)
    kv = kv_use(status)
    said = f"{waiting} requests wait, KV {kv:.0%}"
    if waiting >= rules.waiting * now or kv > rules.kv_high:
        return Decision(min(now + 1, rules.instances_max), now, said)
    fits = now > rules.instances_min and kv * now / (now - 1) < rules.kv_high
    if not waiting and kv < rules.kv_low and fits:
        done_s = _since(status, (OperationState.DONE,), now_unix_s)
        if done_s < rules.calm_s:
            return Decision(now, now, f"{said}, but the last change was {done_s:.0f} s ago")
        return Decision(now - 1, now, said)
    return Decision(now, now, said)


def _since(status: ClusterStatus, states: Collection[OperationState], now_unix_s: float) -> float:
    """Seconds since the last change of the number of instances that ended so; infinite if none did."""
    ended = [
        operation.finished_unix_s
        for operation in status.operations
        if operation.kind is OperationKind.SCALE and operation.state in states
    ]
    return now_unix_s - max(ended, default=-math.inf)


def kv_use(status: ClusterStatus) -> float:
    """Of the stage that has the least left: what requests have of the blocks of the nodes that serve it."""
    used: dict[int, int] = {}
    total: dict[int, int] = {}
    for node in status.nodes:
        if node.state is NodeState.GREEN and node.serving and node.blocks_total:
            used[node.stage] = used.get(node.stage, 0) + node.blocks_used
            total[node.stage] = total.get(node.stage, 0) + node.blocks_total
    return max((used[stage] / total[stage] for stage in total), default=0.0)


def pods_of(status: ClusterStatus, instances: int, spares: int) -> int:
    """How many pods the StatefulSet of each stage has to have for so many instances. None is left out that is home to a
    stage, serves or holds a copy; the last ones of a StatefulSet go first."""
    stages = max((1, *(len(pipeline.stages) for pipeline in status.pipelines)))
    return max(instances + spares, *(1 + number_of(node) // stages for node in _needed(status)), 0)


def _needed(status: ClusterStatus) -> Iterable[str]:
    for pipeline in status.pipelines:
        for stage in pipeline.stages:
            yield from () if pipeline.closing else stage.homes
            yield from (member.node for member in (*stage.serving, *stage.replicas))
