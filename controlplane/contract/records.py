"""What processes register in etcd, and operations: small, declarative, owned by one writer each."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec

from controlplane.contract.ids import Member, NodeId


class NodeRecord(msgspec.Struct, frozen=True):
    """A node process whose weights are loaded and whose ports are open. Leased: gone when the process is."""

    member: Member
    group: str
    stage: int  # the stage whose weights it holds
    num_stages: int
    link_address: str  # what its transport offers: "kind=where,kind=where"
    rpc_address: str  # "host:port" of the front door (gRPC)
    weights_digest: str  # of the stage's tensors: only equal digests may stand in for each other
    pool_blocks: int
    block_size: int  # tokens
    pid: int
    rank: int = 0
    fault_domain: dict[str, str] = {}  # labels, outermost first: {"site": ..., "rack": ..., "host": ...}
    started_unix_s: float = 0.0
    host_parallel: int = 1 << 16  # nodes like this one that its host can let compute at the same time
    numerics: str = ""  # digest of what decides the bits: only equal ones exchange KV
    context_len: int = 0  # tokens of one request, prompt and output together, that it serves; 0: not told
    version: str = ""  # of the installed code: `version.code_version`
    settings: str = ""  # `version.settings_digest` of what the process runs with
    process: str = ""  # `controlplane.process.identity`: whose record this is, and whether it has died
    grammars: str = ""  # version of the library that constrains outputs; "": its code passes over grammars
    sampling: int = 0  # `requests.SAMPLING_VERSION` of its code, which passes over what came later
    checkpoint: str = ""  # whose stage its weights are, equal for all stages of one; "": not known


class ControllerRecord(msgspec.Struct, frozen=True):
    """A candidate for leader. Leased."""

    id: str
    rpc_address: str  # gRPC: node reports
    admin_address: str  # HTTP: admin API and dashboard
    pid: int
    incarnation: str = ""  # of the process, as a node's member has it
    version: str = ""  # as a node's
    settings: str = ""
    process: str = ""


class Hearing(msgspec.Struct, frozen=True):
    """What a controller tells the others, not leased. How many registered nodes it hears: a leader that hears clearly
    fewer gives way. And the newest topology that it knows of: etcd may be restored from a snapshot that is older."""

    id: str
    nodes: int
    topology_counter: int = 0


class GatewayRecord(msgspec.Struct, frozen=True):
    """A gateway. Leased."""

    id: str
    address: str  # HTTP "host:port"
    pid: int
    incarnation: str = ""
    version: str = ""  # as a node's
    settings: str = ""
    process: str = ""
    topology_counter: int = 0  # that it knows of, once it has seen etcd go back to an older one


class Waiting(msgspec.Struct, frozen=True):
    """A process that waits for a name which another one holds, at `waiting/` and the name's own key. Leased."""

    who: str  # the holder, in words
    by: str  # who waits


class OperationKind(StrEnum):
    DRAIN = "drain"
    CORDON = "cordon"
    UNDRAIN = "undrain"  # uncordon is the same: the cordon is lifted, duties come back
    REPLACE = "replace"
    TRANSFER = "transfer-leader"
    PAUSE = "pause"
    RESUME = "resume"
    RESTART = "restart"
    SCALE = "scale"


# These are about the whole group: `Operation.node` is empty, or (transfer-leader) may be.
GROUP_WIDE = frozenset(
    {OperationKind.TRANSFER, OperationKind.PAUSE, OperationKind.RESUME, OperationKind.SCALE}
)


class RestartScope(StrEnum):
    """What a restart restarts, one process after the other."""

    NODES = "nodes"
    CONTROLLERS = "controllers"
    GATEWAYS = "gateways"
    ALL = "all"


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ProcessKind(StrEnum):
    CONTROLLER = "controller"
    GATEWAY = "gateway"
    NODE = "node"


class Target(msgspec.Struct, frozen=True):
    """A process that has to make way for a fresh one of the same name."""

    kind: ProcessKind
    member: Member

    identity: ClassVar[tuple[str, ...]] = ("kind", "member")


class Asked(msgspec.Struct, frozen=True):
    """By whom, as the audit tells it: whoever takes an operation up can write its first line, too."""

    who: str
    role: str  # a newer release may have others
    address: str = ""
    reason: str = ""
    epoch: int = 0


class Operation(msgspec.Struct, frozen=True):
    """What an operator asked for. It stays in etcd, so that a new leader resumes it; ids make it idempotent."""

    id: str
    kind: OperationKind
    # transfer-leader: the controller that is to lead; restart: a RestartScope, or an instance.
    node: NodeId = ""
    substitute: NodeId | None = None  # replace --with
    # replace without --with: the incarnation that has to make way for a fresh one
    incarnation: str | None = None
    state: OperationState = OperationState.RUNNING
    message: str = ""
    created_unix_s: float = 0.0
    deadline_unix_s: float = 0.0  # 0: none
    finished_unix_s: float = 0.0
    targets: tuple[Target, ...] = ()  # restart: who ran when it was asked for, in order
    turn: int = 0  # restart: whose turn it is; len(targets): all have been
    # restart: what the fresh processes have to be made of (`NodeRecord.version`, `.settings`); "": just equal
    version: str = ""
    settings: str = ""
    instances: int = 0  # scale: so many are wanted
    asked: Asked | None = None  # of older code: not known

    identity: ClassVar[tuple[str, ...]] = ("id",)

    @property
    def open(self) -> bool:
        return self.state is OperationState.RUNNING
