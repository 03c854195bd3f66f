"""What every kind of operation can be asked. A kind overrides what it does differently, in one module of its own.

All of it is pure: an `Operation` is a value in etcd that says what should be, and its progress is read off the topology
and the registrations alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from controlplane.contract.events import EventKind
from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.status import Check, OperationRequest
from controlplane.contract.topology import Topology
from controlplane.core.membership import Nodes
from controlplane.core.placement import Layout
from controlplane.core.policy import Situation, Want

# What operations claim beside processes; no process has such a name.
LEADER, AUTOMATION, INSTANCES = "the leader", "automation", "instances"


@dataclass(frozen=True, slots=True)
class Kind(ABC):
    """One operation, as its kind understands it."""

    op: Operation

    kind: ClassVar[OperationKind]
    # What is so once it is done; "{node}" stands for its node, "{instances}" for their number.
    done_words: ClassVar[str]
    done_event: ClassVar[EventKind] = EventKind.OPERATION  # what its end is called in the history
    needs_automation: ClassVar[bool] = True  # it gets nowhere while automation is paused

    # -- before it begins ---------------------------------------------------------------------------------

    @classmethod
    def declared(cls, op: Operation, request: OperationRequest, s: Situation) -> Operation:
        """The operation that goes to etcd: `op`, with what only this kind keeps of the request or the situation."""
        return op

    @abstractmethod
    def claims(self) -> frozenset[str]:
        """What it needs to itself: later operations that claim the same wait."""

    def avoids(self) -> frozenset[NodeId]:
        """Nodes that get no new duty while it runs."""
        return frozenset()

    @abstractmethod
    def checks(self, s: Situation) -> Iterator[Check]:
        """The pre-flight. A "fail" refuses the operation."""

    @abstractmethod
    def plan(self, s: Situation) -> Iterator[str]:
        """The steps, in words."""

    # -- while it is under way ----------------------------------------------------------------------------

    @property
    def moves_nodes(self) -> bool:
        """Whether nodes have to be emptied for it, which mode stop-restart cannot."""
        return False

    def stands_as(self) -> Operation:
        """What it amounts to now: another operation, of which it is made up, or itself."""
        return self.op

    def empties(self, nodes: Nodes) -> bool:
        """Whether it wants its node to hold nothing."""
        return False

    def wants(self, s: Situation, layout: Layout) -> Iterable[Want]:
        """What it wants moved. `layout`: of the situation's topology."""
        return ()

    def edit(self, s: Situation) -> Topology | None:
        """What it changes in the topology itself, beside moves; None: nothing (yet)."""
        return None

    def edit_first(self, s: Situation) -> Topology | None:
        """As `edit`, before anything else, repairs included."""
        return None

    def edit_paused(self, s: Situation) -> Topology | None:
        """As `edit`, while automation is paused."""
        return None

    def should_resign(self, s: Situation) -> str:
        """Why the leader should hand leadership over now; "" if it should not."""
        return ""

    # -- how far it is ------------------------------------------------------------------------------------

    def advanced(self, s: Situation) -> Operation:
        """The operation further on, if a part of it is over; else the same object."""
        return self.op

    def amiss(self, s: Situation) -> str:
        """Why it has failed, in words; "" if it has not."""
        return ""

    @abstractmethod
    def is_done(self, s: Situation) -> bool:
        """Whether what the operator asked for is so."""

    def last_words(self) -> str:
        return self.done_words.format(node=self.op.node, instances=self.op.instances)

    def doing(self, s: Situation) -> str:
        """One line for people; it changes with each phase and not more often."""
        return "nearly done"

    def counted(self, message: str) -> str:
        """`message`, after which of its parts it is about."""
        return message
