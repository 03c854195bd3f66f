"""cordon: no new duty for a node; what it serves stays, and its copies do until there is another place for them."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.contract.topology import Topology
from controlplane.core.edit import successor
from controlplane.core.kinds.nodes import OfNode, peers_left
from controlplane.core.policy import Situation


class Cordon(OfNode):
    __slots__ = ()
    kind = OperationKind.CORDON
    done_words = "{node} gets no new duty; what it serves stays"

    def node_checks(self, s: Situation) -> Iterator[Check]:
        if self.op.node in s.topology.cordoned:
            yield Check("warn", "cordon", f"{self.op.node} is cordoned already: nothing to do")
        yield from peers_left(s, self.op.node)

    def plan(self, s: Situation) -> Iterator[str]:
        yield f"cordon {self.op.node}: no new duty; what it serves stays"

    def edit(self, s: Situation) -> Topology | None:
        t, node = s.topology, self.op.node
        return successor(t, cordoned=(*t.cordoned, node)) if node not in t.cordoned else None

    def is_done(self, s: Situation) -> bool:
        return self.op.node in s.topology.cordoned
