"""What protects the KV of a group, what that takes, and what the loss of each node would cost now."""

from __future__ import annotations

import msgspec

from controlplane.contract.ids import NodeId
from controlplane.contract.repair import Restoring
from controlplane.contract.topology import Mode


class Loss(msgspec.Struct, frozen=True):
    """What would follow if the process of one node ended now."""

    node: NodeId
    serves: tuple[str, ...] = ()  # "p0/1": pipeline and stage
    streams: int = 0  # that would wait
    tokens: int = 0  # positions to be computed again
    restore_bytes: int = 0  # KV that would be brought back from parity
    # Until the slowest stream has its next token; None: something of it has not been measured yet.
    wait_s: float | None = 0.0
    how: tuple[str, ...] = ()  # for each pipeline, in words
    down: tuple[str, ...] = ()  # pipelines that nobody else could serve
    exposed_bytes: int = 0  # copies and parity of others that it holds: these are to be made again


class Protection(msgspec.Struct, frozen=True):
    group: str
    mode: Mode
    policy: str  # in words: "one copy", "rs 4+2"
    kv_bytes: int  # of requests
    protected_bytes: int  # of these, what would survive the loss of one node
    spent_bytes: int  # of copies or parity, of the whole group, kept ones included
    lag_tokens: int  # written, and not protected yet: full blocks, over all stages
    tail_tokens: int  # in blocks that are not full, which are computed again after any loss, over all stages
    # From a failure until its pipeline's stages answered again: median of the failures measured lately; None: of none.
    overhead_s: float | None
    measured: int  # failures of which `overhead_s` is the median
    losses: tuple[Loss, ...] = ()  # by node
    restoring: Restoring = Restoring()  # how fast blocks are restored: as nodes that had some lately say
