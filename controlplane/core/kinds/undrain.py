"""undrain (uncordon is the same): lift the cordon of a node; hand-back does the rest."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.contract.topology import Topology
from controlplane.core.edit import successor
from controlplane.core.kinds.nodes import OfNode, hand_backs
from controlplane.core.policy import Situation


class Undrain(OfNode):
    __slots__ = ()
    kind = OperationKind.UNDRAIN
    done_words = "{node} takes part again"

    def node_checks(self, s: Situation) -> Iterator[Check]:
        node = self.op.node
        if self.op.substitute is not None:
            yield Check("fail", "substitute", "undrain takes no substitute")
        cordoned = node in s.topology.cordoned
        message = f"{node} is cordoned" if cordoned else f"{node} is not cordoned: nothing to do"
        yield Check("ok" if cordoned else "warn", "cordon", message)

    def plan(self, s: Situation) -> Iterator[str]:
        yield f"uncordon {self.op.node}"
        yield from hand_backs(s.topology, self.op.node)

    def edit(self, s: Situation) -> Topology | None:
        t, node = s.topology, self.op.node
        return successor(t, cordoned=set(t.cordoned) - {node}) if node in t.cordoned else None

    def is_done(self, s: Situation) -> bool:
        return self.op.node not in s.topology.cordoned
