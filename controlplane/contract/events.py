"""The cluster's history: what happened, to whom, with phases and durations. Stored in SQL, shown on the dashboard."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class EventKind(StrEnum):
    LEADER = "leader"  # a controller became leader
    JOINED = "joined"  # a node's weights are loaded and it registered
    SUSPECTED = "suspected"
    CLEARED = "cleared"  # a suspicion turned out to be wrong
    DIED = "died"
    LEFT = "left"  # exited on purpose
    EPOCH = "epoch"  # who serves a pipeline changed
    RECOVERED = "recovered"  # a pipeline serves again; phases in `details`
    MOVE = "move"  # a planned move began, switched or was called off
    DRAINED = "drained"
    REPLACED = "replaced"
    SCALED = "scaled"  # an instance was added, or takes no new request any more, or is gone
    UNAVAILABLE = "unavailable"  # no node is left for a stage
    OPERATION = "operation"
    BLEMISH = "blemish"  # something in the topology is wrong; work goes on around it


class Event(msgspec.Struct, frozen=True):
    kind: EventKind
    subject: str  # node, pipeline or operation
    message: str  # one line for people
    unix_s: float = 0.0
    epoch: int = 0
    details: dict[str, float | int | str] = {}  # durations in seconds end with _s
