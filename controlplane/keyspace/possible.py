"""Values that can be read and cannot be: no planner could lead over them, and no process could tell them to another.

What is merely wrong (a node twice, a move of no stage) is left to the planner, which mends it or names it, and leads.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from controlplane.contract.records import NodeRecord, Operation
from controlplane.contract.revocations import Revocation
from controlplane.contract.topology import Topology

# Of counters and epochs: of the 64 bits that they have in frames one is left, so that they can go on.
COUNTER_MAX = (1 << 63) - 1


def fault(value: msgspec.Struct, name: str) -> str:
    """Why the value cannot stand under this name, in words; "": it can."""
    match value:
        case Topology():
            return _of_topology(value, name)
        case NodeRecord() if value.member.node != name:
            return f"it speaks of {value.member.node}"
        case Operation() | Revocation() if value.id != name:
            return f"it speaks of {value.id}"
    if not 0 <= getattr(value, "topology_counter", 0) <= COUNTER_MAX:
        return "it tells a counter that no topology has"
    try:
        msgspec.msgpack.encode(value)
    except OverflowError:
        return "a number has more than 64 bits"
    return ""


def _of_topology(topology: Topology, name: str) -> str:
    if name != f"{topology.group}/topology":
        return f"it is of the group {topology.group}"
    if not 0 <= topology.counter <= COUNTER_MAX:
        return "no topology has such a counter"
    for pipeline in topology.pipelines:
        if not (0 <= pipeline.epoch <= COUNTER_MAX and 0 <= pipeline.moved <= COUNTER_MAX):
            return f"no pipeline has such an epoch as {pipeline.id}"
        if pipeline.move is not None and abs(pipeline.move.stage) > COUNTER_MAX:
            return f"no pipeline has such a stage as {pipeline.id} moves"
    twice = [of for of, count in Counter(p.id for p in topology.pipelines).items() if count > 1]
    return f"two pipelines are {twice[0]}" if twice else ""
