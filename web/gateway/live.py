"""What the router knows of one live request, and its limits (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.requests import Refused
from web.gateway.tokenlog import TokenLog


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, unless the name says otherwise."""

    live_max: int = 1536  # requests; more are refused
    places: int = 256  # requests that a pipeline runs at a time; more wait there
    grace_s: float = 5.0  # a stream with no scheduler is held this long
    retry_s: float = 0.02  # after NOT_HERE: topology reaches nodes and gateways at different moments
    move_after_s: float = 0.5  # its pipeline is down and another one is up
    unreachable_s: float = 2.5  # its scheduler cannot be reached, yet the topology says that it serves
    again_s: float = 0.1  # between two re-submits for missing tokens
    # Deaths are charged to every request in its first step then. Two faults in quick succession must not
    # fail innocent ones, so it takes one more than the two that a poison request would need.
    deaths_max: int = 3
    poisoned_max: int = 2  # nodes on which its numbers were not finite: here the blame is exact


@dataclass(slots=True)
class Live:
    """One request. `sent_to` is the scheduler that has it; None: it is held here."""

    log: TokenLog
    priority: int
    last_token_at: float
    pipeline: PipelineId | None = None
    sent_to: Member | None = None
    sent_at: float = 0.0
    last_member: Member | None = None  # the last one it was sent to, whatever became of it
    held_since: float | None = None  # since when no scheduler has been at work on it; None: one is
    retry_at: float = 0.0
    again_at: float | None = None  # tokens are missing: submit again then
    asked_at: float = -1e9
    how: str = ""  # what befell it since its last token
    torn: bool = False  # from the scheduler that had it; the topology has yet to say whether a node died
    deaths: int = 0  # nodes that died while it was in its first step
    poisoned: set[NodeId] = field(default_factory=set)  # nodes on which its numbers were not finite
    full: set[PipelineId] = field(default_factory=set)  # pipelines that refused it for load
    context: bytes | None = None  # see Submit
    reader: int = 0
    may_overtake: bool = True  # once, and as long as no scheduler can have accepted it: see `overtake`

    def overtake(self, refusal: Refused) -> bool:
        """Come after the reader that a SUPERSEDED names; False: it has the last word.

        The scheduler that knew that reader may have been out of reach when all were asked for it. Whoever was accepted
        before is the older connection and gives way, and so does who has overtaken once: two gateways of one stream
        would take it from each other for ever.
        """
        if refusal.reader is None or not self.may_overtake:
            return False
        self.reader, self.may_overtake = refusal.reader + 1, False
        return True
