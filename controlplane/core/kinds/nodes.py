"""What operations on one node have in common, and where a node has its duties."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from controlplane.contract.ids import NodeId
from controlplane.contract.status import Check
from controlplane.contract.topology import Pipeline, Stage, Topology
from controlplane.core.kinds.kind import Kind
from controlplane.core.policy import Situation


class OfNode(Kind):
    """An operation on `op.node`."""

    __slots__ = ()

    def claims(self) -> frozenset[str]:
        return frozenset({self.op.node, self.op.substitute or self.op.node})

    def avoids(self) -> frozenset[NodeId]:
        return frozenset({self.op.node})

    def checks(self, s: Situation) -> Iterator[Check]:
        node = self.op.node
        named = node in s.topology.cordoned or s.topology.serving(node) or home_stages(s.topology, node)
        if node not in s.nodes.views and not named:
            yield Check("fail", "node", f"there is no node {node}")
            return
        if s.topology.paused:
            yield Check("warn", "paused", "automation is paused: nothing moves until it is resumed")
        yield from self.node_checks(s)

    @abstractmethod
    def node_checks(self, s: Situation) -> Iterator[Check]:
        """The pre-flight, of a node that there is."""


def home_stages(topology: Topology, node: NodeId) -> list[tuple[Pipeline, int, Stage]]:
    """The stages that `node` is home to: pipeline, index, stage."""
    return [
        (p, i, stage) for p in topology.pipelines for i, stage in enumerate(p.stages) if node in stage.homes
    ]


def duties(topology: Topology) -> dict[NodeId, list[tuple[Pipeline, int]]]:
    """As Topology.serving, of every node that serves: where many are asked about."""
    found: dict[NodeId, list[tuple[Pipeline, int]]] = {}
    for pipeline in topology.pipelines:
        for index, stage in enumerate(pipeline.stages):
            for node in {member.node for member in stage.ranks}:
                found.setdefault(node, []).append((pipeline, index))
    return found


def hand_backs(topology: Topology, node: NodeId) -> Iterator[str]:
    """Steps of a plan: what `node` gets back."""
    return (f"hand {p.id}/{index} back to {node}" for p, index, _ in home_stages(topology, node))


def peers_left(s: Situation, node: NodeId) -> Iterator[Check]:
    """Who could serve the stages of `node` without it."""
    stages = {index for _, index in s.topology.serving(node)}
    stages |= {index for _, index, _ in home_stages(s.topology, node)}
    for stage in sorted(stages):
        left = [
            n for n, v in s.nodes.views.items() if v.usable and v.record.stage == stage and n not in s.avoid
        ]
        if len(left) == 1:
            yield Check("warn", "peers", f"stage {stage} then hangs on {left[0]} alone")
        elif left:
            yield Check("ok", "peers", f"stage {stage} is then held by {', '.join(left)}")
