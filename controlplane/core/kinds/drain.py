"""drain: avoid a node, move what it serves and the copies it holds away, keep it cordoned."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.events import EventKind
from controlplane.contract.ids import NodeId
from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.contract.topology import Topology
from controlplane.core.edit import successor
from controlplane.core.kinds.emptying import Emptying, holds_copies
from controlplane.core.membership import Nodes
from controlplane.core.policy import Situation


class Drain(Emptying):
    __slots__ = ()
    kind = OperationKind.DRAIN
    done_words = "{node} serves nothing, holds no copy and stays cordoned"
    done_event = EventKind.DRAINED

    def substitute_checks(self, substitute: NodeId, s: Situation) -> Iterator[Check]:
        yield Check("fail", "substitute", "drain takes no substitute")

    def plan(self, s: Situation) -> Iterator[str]:
        yield f"cordon {self.op.node}"
        yield from self.switches(s)
        yield f"{self.op.node} is empty and stays cordoned"

    def empties(self, nodes: Nodes) -> bool:
        return True

    def edit(self, s: Situation) -> Topology | None:
        t, node = s.topology, self.op.node
        return successor(t, cordoned=(*t.cordoned, node)) if node not in t.cordoned else None

    def is_done(self, s: Situation) -> bool:
        t, node = s.topology, self.op.node
        return node in t.cordoned and not t.serving(node) and not holds_copies(t, node)
