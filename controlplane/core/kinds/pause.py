"""pause: automation off. Nobody would end a move meanwhile, nor see that it takes too long: all are called off."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from controlplane.contract.records import OperationKind
from controlplane.contract.status import Check
from controlplane.contract.topology import Topology
from controlplane.core.edit import successor
from controlplane.core.kinds.kind import AUTOMATION, Kind
from controlplane.core.policy import Situation


class Pause(Kind):
    __slots__ = ()
    kind = OperationKind.PAUSE
    done_words = "nothing is repaired or moved until it is resumed"

    def claims(self) -> frozenset[str]:
        return frozenset({AUTOMATION})

    def checks(self, s: Situation) -> Iterator[Check]:
        if s.topology.paused:
            yield Check("warn", "paused", "automation is paused already: nothing to do")
            return
        what = "while paused a node that dies is not replaced: its streams wait, then fail"
        yield Check("warn", "repair", what)
        for pipeline in s.topology.pipelines:
            if (move := pipeline.move) is not None:
                place = f"{pipeline.id}/{move.stage} to {move.to.node}"
                yield Check("warn", "moves", f"the move of {place} is called off")

    def plan(self, s: Situation) -> Iterator[str]:
        yield "call moves off"
        yield "plan nothing more"

    def edit_first(self, s: Situation) -> Topology | None:
        if s.topology.paused:
            return None
        return successor(s.topology, *[replace(p, move=None) for p in s.topology.pipelines], paused=True)

    def is_done(self, s: Situation) -> bool:
        return s.topology.paused
