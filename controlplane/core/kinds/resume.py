"""resume: automation on. What died meanwhile is repaired, and operations go on."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.contract.topology import Topology
from controlplane.core.edit import successor
from controlplane.core.kinds.kind import AUTOMATION, Kind
from controlplane.core.policy import Situation


class Resume(Kind):
    __slots__ = ()
    kind = OperationKind.RESUME
    done_words = "failures are repaired again"
    needs_automation = False

    def claims(self) -> frozenset[str]:
        return frozenset({AUTOMATION})

    def checks(self, s: Situation) -> Iterator[Check]:
        paused = s.topology.paused
        message = "automation is paused" if paused else "automation is not paused: nothing to do"
        yield Check("ok" if paused else "warn", "paused", message)

    def plan(self, s: Situation) -> Iterator[str]:
        yield "plan again: dead nodes are replaced, operations go on"

    def edit_paused(self, s: Situation) -> Topology | None:
        return successor(s.topology, paused=False)

    def is_done(self, s: Situation) -> bool:
        return not s.topology.paused
