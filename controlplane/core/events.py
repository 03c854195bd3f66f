"""What the controller's core is told, and what it answers: two closed unions.

The shell feeds events one by one and performs the returned effects in the order of the list, each completed
(or known to be unknown) before its answer event is fed back. What the shell has to keep:

- Before `BecameLeader` it has delivered a snapshot: every node record, every operation and the topology
  (`TopologySeen(None, 0)` where there is none). A leader that knows less would undo what it cannot see.
- Each `WriteTopology` and `WriteOperation` is answered by exactly one of WriteDone, WriteConflict (the compare
  failed; nothing was written) and WriteUnknown (timed out: it may or may not take effect, even later). The answer
  names its write: one from before a leadership was lost and won again may be answered, and even done, after it.
- `Reread` is answered by a fresh TopologySeen or OperationSeen/OperationGone/OperationUnknown, or by nothing if etcd is
  away: the core asks again.
- `Tick` comes every 50 ms or so: a longer gap is taken for a pause of this very process.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.events import Event
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.records import NodeRecord, Operation
from controlplane.contract.reports import NodeReport
from controlplane.contract.topology import Topology


@dataclass(frozen=True, slots=True)
class NodeRegistered:
    """A process put its record under nodes/, or put it again."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class NodeGone:
    """A record under nodes/ was deleted, or its lease expired."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeersSeen:
    """Who is registered beside the nodes, as etcd has it. Told again, whole, whenever it changes."""

    controllers: tuple[Member, ...] = ()
    gateways: tuple[Member, ...] = ()
    candidates: tuple[str, ...] = ()  # controllers in the order in which they would lead, the leader first
    # How many registered nodes each controller hears, as it told last.
    hears: tuple[tuple[str, int], ...] = ()

    made_of: tuple[tuple[str, str, str], ...] = ()  # name, version of the code, digest of the settings
    forgotten: int = 0  # counter of a topology that one of them knows, and etcd no longer has

    def find(self, name: str) -> Member | None:
        """The newest process of that name."""
        return next((m for m in (*self.controllers, *self.gateways) if m.node == name), None)


@dataclass(frozen=True, slots=True)
class ReportReceived:
    report: NodeReport


@dataclass(frozen=True, slots=True)
class HeartbeatsReceived:
    """These were heard; what they last reported still holds."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class ReportStreamBroken:
    """The stream of a member's reports to this controller ended, however it ended."""

    member: Member


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The process of a member has ended for certain: the kernel of its host says so."""

    member: Member


@dataclass(frozen=True, slots=True)
class TopologySeen:
    """The group's topology as etcd has it (None: there is none), by watch or, if `read`, by the read asked for."""

    topology: Topology | None
    mod_revision: int
    read: bool = False


@dataclass(frozen=True, slots=True)
class OperationSeen:
    operation: Operation
    mod_revision: int
    read: bool = False  # by the read asked for, not by watch


@dataclass(frozen=True, slots=True)
class OperationGone:
    id: str


@dataclass(frozen=True, slots=True)
class OperationUnknown:
    """The operation is there, and this code cannot read it: it is neither over nor to be overwritten."""

    id: str


@dataclass(frozen=True, slots=True)
class BecameLeader:
    pass


@dataclass(frozen=True, slots=True)
class LostLeadership:
    pass


@dataclass(frozen=True, slots=True)
class WriteDone:
    """The write took effect at `mod_revision`."""

    write: Write
    mod_revision: int


@dataclass(frozen=True, slots=True)
class WriteConflict:
    """Nothing was written: the value had changed, or the leadership is lost."""

    write: Write


@dataclass(frozen=True, slots=True)
class WriteUnknown:
    """No answer in time: the write may have taken effect, or may yet."""

    write: Write


@dataclass(frozen=True, slots=True)
class Tick:
    pass


CoreEvent = (
    NodeRegistered
    | NodeGone
    | PeersSeen
    | ReportReceived
    | HeartbeatsReceived
    | ReportStreamBroken
    | ProcessEnded
    | TopologySeen
    | OperationSeen
    | OperationGone
    | OperationUnknown
    | BecameLeader
    | LostLeadership
    | WriteDone
    | WriteConflict
    | WriteUnknown
    | Tick
)


@dataclass(frozen=True, slots=True)
class WriteTopology:
    """Compare-and-swap; the shell adds the leadership guard. `expected_mod_revision` 0: the key must be absent."""

    topology: Topology
    expected_mod_revision: int


@dataclass(frozen=True, slots=True)
class WriteOperation:
    """As WriteTopology, for operations/<id>."""

    operation: Operation
    expected_mod_revision: int


Write = WriteTopology | WriteOperation


@dataclass(frozen=True, slots=True)
class ForgetOperation:
    """Delete operations/<id>: it is over, and newer ones are remembered. Losing this effect is harmless."""

    operation: str


@dataclass(frozen=True, slots=True)
class Reread:
    """Read the topology (`operation` None) or one operation from etcd, linearizably, and tell what is there."""

    operation: str | None = None


@dataclass(frozen=True, slots=True)
class Resign:
    """Give leadership away and queue up for it again. Answered by LostLeadership."""

    why: str


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the cluster's history. Losing one is allowed; delaying a write for one is not."""

    event: Event


Effect = Write | ForgetOperation | Reread | Resign | Record
