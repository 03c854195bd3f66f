"""transfer-leader: whoever leads and is not meant resigns, until the one that is meant leads."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.status import Check, OperationRequest
from controlplane.core.kinds.kind import LEADER, Kind
from controlplane.core.policy import Situation


class Transfer(Kind):
    __slots__ = ()
    kind = OperationKind.TRANSFER
    done_words = "{node} leads"
    needs_automation = False

    @classmethod
    def declared(cls, op: Operation, request: OperationRequest, s: Situation) -> Operation:
        """Who is to lead: the controller that is named, else the next in line."""
        return replace(op, node=op.node or next(iter(s.policy.peers.candidates[1:]), ""))

    def claims(self) -> frozenset[str]:
        return frozenset({LEADER})

    def checks(self, s: Situation) -> Iterator[Check]:
        to, candidates = self.op.node, s.policy.peers.candidates
        if len(candidates) < 2:
            yield Check("fail", "candidates", "there is no second candidate that could lead")
        elif to not in candidates:
            yield Check("fail", "candidates", f"{to} is none of the candidates: {', '.join(candidates)}")
        elif to == candidates[0]:
            yield Check("warn", "candidates", f"{to} leads already: nothing to do")
        else:
            yield Check("ok", "candidates", f"{to} is ready to lead after {candidates[0]}")

    def plan(self, s: Situation) -> Iterator[str]:
        yield f"{next(iter(s.policy.peers.candidates), 'the leader')} resigns"
        yield f"{self.op.node or 'nobody'} leads"

    def should_resign(self, s: Situation) -> str:
        if self.op.node != s.policy.me and self.op.node in s.policy.peers.candidates:
            return f"{self.op.node} is to lead ({self.op.id})"
        return ""

    def is_done(self, s: Situation) -> bool:
        return self.op.node == s.policy.me  # only the leader asks

    def doing(self, s: Situation) -> str:
        there = self.op.node in s.policy.peers.candidates
        return f"handing over to {self.op.node}" if there else f"{self.op.node} is no candidate just now"
