"""What a game day sees of the cluster (pure): which processes there are, and who is not where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.contract.topology import Mode
from controlplane.kfadmin.chaos.plan import Role, role_of


@dataclass(frozen=True, slots=True)
class Sight:
    """One look. `away`: process -> why it does not count as there. `amiss`: what else keeps faults back, or ""."""

    away: Mapping[str, str]
    amiss: str = ""
    leader: str = ""

    @property
    def home(self) -> bool:
        return not self.away and not self.amiss

    @property
    def why(self) -> str:
        """Why it is not home, in words."""
        told = [f"{name} {why}" for name, why in list(self.away.items())[:4]]
        return "; ".join([*told, *filter(None, [self.amiss])])


def look(status: ClusterStatus, pids: Mapping[str, int], expected: Iterable[str]) -> Sight:
    """`pids`: of what runs, by the run directory; `expected`: names of all processes of the cluster.

    A process counts as there only when the controllers know the very process that runs: a dead one may seem well to
    them for a moment.
    """
    known = {one.id: one.pid for one in status.controllers} | {one.id: one.pid for one in status.gateways}
    known |= {node.node: node.pid for node in status.nodes}
    away: dict[str, str] = {}
    for name in expected:
        if name not in pids:
            away[name] = "does not run"
        elif role_of(name) in (Role.NODE, Role.GATEWAY, Role.CONTROLLER) and known.get(name) != pids[name]:
            away[name] = "has not joined"
    for node in status.nodes:
        if node.cordoned:
            away.setdefault(node.node, "is cordoned")
        elif node.state is not NodeState.GREEN:
            away.setdefault(node.node, f"is {node.state.value}")
    for pipeline in status.pipelines:
        for index, stage in enumerate(pipeline.stages):
            serving = {member.node for member in stage.serving}
            for home in set(stage.homes) - serving:
                away.setdefault(home, f"does not serve {pipeline.id}/{index}")
    return Sight(away, _amiss(status), status.leader)


def _amiss(status: ClusterStatus) -> str:
    if status.paused:
        return "automation is paused: `kfadmin resume`"
    if not status.leader:
        return "nobody leads"
    for pipeline in status.pipelines:
        if pipeline.state is not PipelineState.UP:
            return f"{pipeline.id} is {pipeline.state.value}"
        if status.mode is Mode.REPLICATE and len(status.pipelines) > 1:
            for index, stage in enumerate(pipeline.stages):
                if not stage.replicas:
                    return f"{pipeline.id}/{index} has no copy"
    return ""
