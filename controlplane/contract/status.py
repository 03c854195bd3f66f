"""The cluster as a controller sees it: what the admin API answers, kfadmin prints and the dashboard draws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated

import msgspec

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.repair import Restoring
from controlplane.contract.topology import Mode, Move

NAMED_MAX = 16  # names in one line
REASON_CHARS_MAX = 500
# Lines of text: without what a terminal obeys, or what turns the order of the characters round.
SHOWABLE = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*$"


class NodeState(StrEnum):
    GREEN = "green"
    YELLOW = "yellow"  # suspected: gets no new duty
    RED = "red"  # dead, as far as the evidence goes
    ABSENT = "absent"  # a home that never registered


class NodeStatus(msgspec.Struct, frozen=True):
    node: NodeId
    state: NodeState
    incarnation: str = ""
    evidence: str = ""  # why it is not green
    stage: int = -1
    serving: tuple[str, ...] = ()  # "p0/1": pipeline and stage
    cordoned: bool = False
    leaving: bool = False  # is to end: what it serves moves away
    link_address: str = ""
    rpc_address: str = ""
    pid: int = 0
    silent_s: float = 0.0
    progress: int = 0
    slowness: float = 0.0  # against its peers; from 1 on it is slow
    blocks_used: int = 0
    blocks_replica: int = 0
    blocks_total: int = 0
    block_bytes: int = 0
    fault_domain: dict[str, str] = {}
    counters: dict[str, int] = {}
    version: str = ""  # of its code
    settings: str = ""  # digest
    troubles: tuple[str, ...] = ()  # what an operator has to mend, by its last report
    numerics: str = ""  # precision, device and digest of all that decides its bits (NodeRecord)
    restoring: Restoring = Restoring()  # how fast it had blocks restored from parity


class StageStatus(msgspec.Struct, frozen=True):
    homes: tuple[NodeId, ...]
    serving: tuple[Member, ...]
    borrowed: bool  # somebody else's node serves
    replicas: tuple[Member, ...]
    lag_tokens: int  # of the slowest replica, or of parity; -1: unprotected or unknown


class PipelineState(StrEnum):
    UP = "up"
    DEGRADED = "degraded"  # serves with a borrowed or a suspected node
    MOVING = "moving"  # a planned move is under way
    DOWN = "down"
    FORMING = "forming"  # never served yet


class PipelineStatus(msgspec.Struct, frozen=True):
    id: PipelineId
    state: PipelineState
    epoch: int
    stages: tuple[StageStatus, ...]
    running: int
    waiting: int
    move: Move | None = None
    tokens: int = 0  # positions that have KV ...
    tail_tokens: int = 0  # ... and those of them in blocks that are not full
    token_s: float = 0.0  # what a position costs that is computed again; 0: not measured yet
    step_s: float = 0.0  # how long a step without prompts takes; 0: not measured yet
    # Where instances hold copies of single requests: positions in full blocks of those that none holds; else -1.
    unheld_tokens: int = -1
    pace_s: float = 0.0  # for each position of a prompt of many steps, as in reports
    chunk_tokens: int = 0  # positions that a step has which computes again what was lost
    closing: bool = False  # takes no new request, and is removed once its streams have ended


class ControllerStatus(msgspec.Struct, frozen=True):
    id: str
    admin_address: str
    pid: int
    leader: bool
    version: str = ""
    settings: str = ""


class GatewayStatus(msgspec.Struct, frozen=True):
    id: str
    address: str
    pid: int
    version: str = ""
    settings: str = ""


class ClusterStatus(msgspec.Struct, frozen=True):
    cluster: str
    group: str
    model: str
    mode: Mode
    available: bool  # at least one pipeline serves, and none of its nodes is dead
    counter: int  # of the newest topology
    paused: bool
    leader: str  # "" while there is none
    answered_by: str  # the controller that made this
    etcd_age_s: float  # seconds since etcd was last heard: how old all of this may be
    nodes: tuple[NodeStatus, ...]
    pipelines: tuple[PipelineStatus, ...]
    controllers: tuple[ControllerStatus, ...]
    gateways: tuple[GatewayStatus, ...]
    operations: tuple[Operation, ...]
    blemishes: tuple[str, ...] = ()  # what is wrong in the topology; work goes on around it
    # Why the cluster cannot be changed, or not wholly, and what to do about it.
    troubles: tuple[str, ...] = ()


def made_of(status: ClusterStatus) -> list[tuple[str, str, str]]:
    """Name, version of the code and digest of the settings of each process that is not known to be dead."""
    nodes = [n for n in status.nodes if n.pid and n.state is not NodeState.RED]
    return [
        *((node.node, node.version, node.settings) for node in nodes),
        *((one.id, one.version, one.settings) for one in status.controllers),
        *((one.id, one.version, one.settings) for one in status.gateways),
    ]


def numerics_of_stages(status: ClusterStatus) -> dict[int, dict[str, list[NodeId]]]:
    """Stage -> numerics -> the nodes that have them, of those that are not known to be dead."""
    found: dict[int, dict[str, list[NodeId]]] = {}
    for node in status.nodes:
        if node.numerics and node.state is not NodeState.RED:
            found.setdefault(node.stage, {}).setdefault(node.numerics, []).append(node.node)
    return dict(sorted(found.items()))


def mixtures(status: ClusterStatus) -> list[str]:
    """What processes differ in that ought to be equal, in words: the versions of their code, their settings, and the
    numerics of one stage's nodes."""
    told = []
    for what, column in (("versions", 1), ("settings", 2)):
        having: dict[str, list[str]] = {}
        for one in made_of(status):
            if one[column]:
                having.setdefault(one[column], []).append(one[0])
        if len(having) > 1:
            told.append(f"mixed {what}: {who_has_what(having)}")
    for stage, numerics in numerics_of_stages(status).items():
        if len(numerics) > 1:
            told.append(
                f"mixed numerics in stage {stage}: {who_has_what(numerics)}: KV is copied only between equal ones, "
                "to the others streams move by recomputation"
            )
    return told


def who_has_what(having: Mapping[str, Sequence[str]]) -> str:
    """ "1+a in n0, n1; 2+b in n2", the most frequent first; of many only some are named."""
    groups = sorted(having.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{found} in {_some(who)}" for found, who in groups)


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED_MAX
    return ", ".join(names[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def near_copies(status: ClusterStatus) -> list[str]:
    """Copies that one failure takes together with what they copy, in words: both are in one place by the outermost
    label in which hosts differ. Hosts without labels say nothing of it."""
    domains = {node.node: node.fault_domain for node in status.nodes if node.fault_domain}
    labels = next(iter(domains.values()), {})
    label = next((label for label in labels if len({d.get(label) for d in domains.values()}) > 1), "host")
    if label in ("host", "node"):
        return []
    found: dict[str, list[str]] = {}
    for pipeline in status.pipelines:
        for index, stage in enumerate(pipeline.stages):
            for serving, copy in itertools.product(stage.serving, stage.replicas):
                ours = domains.get(serving.node, {}).get(label)
                if ours is not None and ours == domains.get(copy.node, {}).get(label):
                    found.setdefault(ours, []).append(f"{pipeline.id}/{index}")
    return [
        f"{label} {value} has both what serves and its copy: {', '.join(stages[:NAMED_MAX])}"
        + (f" and {len(stages) - NAMED_MAX} more" if len(stages) > NAMED_MAX else "")
        for value, stages in sorted(found.items())
    ]


class Check(msgspec.Struct, frozen=True):
    """One line of a pre-flight."""

    level: str  # "ok", "warn", "fail": any fail refuses the operation
    name: str
    message: str


class OperationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /admin/v1/operations. The id comes from the client, so that sending it twice does it once.

    What is not asked for is not sent: an older controller refuses only a field that it would not heed."""

    id: str
    kind: str
    node: NodeId = ""
    substitute: NodeId | None = None
    dry_run: bool = False
    deadline_s: float = 0.0
    version: str = ""  # restart: of the code that the fresh processes have to run; "": they have to be equal
    settings: str = ""  # restart: digest of the settings that they have to have
    instances: int = 0  # scale: so many are wanted
    # Refused unless the topology's counter is this one as the operation is written.
    if_epoch: int | None = None
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX, pattern=SHOWABLE)] = ""  # for the audit

    def is_for(self, known: Operation) -> bool:
        """Whether `known` is what is asked for here. Who is to lead may have been left to the cluster."""
        node = self.node or (known.node if self.kind == OperationKind.TRANSFER else "")
        if self.kind == OperationKind.RESTART and (known.version, known.settings) != (
            self.version,
            self.settings,
        ):
            return False
        wanted = self.kind, node, self.substitute, self.instances
        return (known.kind.value, known.node, known.substitute, known.instances) == wanted


class OperationAnswer(msgspec.Struct, frozen=True):
    accepted: bool  # false: refused, or a dry run; nothing was changed
    checks: tuple[Check, ...]
    plan: tuple[str, ...]  # the steps, in words
    operation: Operation | None = None
