"""Which nodes a group consists of, by their names: what its instances are made of, and who is to run on a host.

A name is "n" and a number, and the number's remainder by the stages is the stage whose weights the node holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count, islice

import msgspec

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import NodeId
from controlplane.contract.topology import Topology

DIGITS_MAX = 9  # of a node's number
WANTED_FILE = "nodes-wanted.json"  # in the run directory: `Wanted`, from the relay to the launcher


class Wanted(msgspec.Struct, frozen=True):
    """What a launcher is to do about the nodes of its host."""

    run: tuple[NodeId, ...]  # all that should run, wherever
    stop: tuple[NodeId, ...]  # have nothing to do any more and are to end


def all_nodes(config: ClusterConfig) -> list[NodeId]:
    """By the settings: the instances' nodes first, then `spares` blank ones for each stage."""
    return [f"n{number}" for number in range((config.instances + config.spares) * config.stages)]


def number_of(node: NodeId) -> int:
    """-1: not a node's name."""
    digits = node.removeprefix("n")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= DIGITS_MAX):
        return -1
    return int(digits) if f"n{int(digits)}" == node else -1


def free_homes(topology: Topology, stages: int, instances: int) -> list[tuple[NodeId, ...]]:
    """The nodes of so many new instances, stage by stage: the lowest numbers that are home to nothing. Who is cordoned
    is passed over."""
    homes = _homes(topology)
    taken = homes | set(topology.cordoned)
    by_stage = [_lowest(stage, stages, instances, taken) for stage in range(stages)]
    return list(zip(*by_stage, strict=True))


def wanted_nodes(topology: Topology, stages: int, spares: int) -> set[NodeId]:
    """Homes of the instances that stay, and for each stage `spares` nodes beside them, the lowest numbers."""
    homes = _homes(topology, closing=False)
    found = set(homes)
    for stage in range(stages):
        found.update(_lowest(stage, stages, spares, homes))
    return found


def wanted_here(topology: Topology, config: ClusterConfig) -> Wanted:
    """What a launcher is to do. Who leaves runs until the topology gives him nothing to do any more. A name that is no
    node's, which only another hand can have written there, is nothing to start or to end."""
    named = {
        member.node
        for pipeline in topology.pipelines
        for stage in pipeline.stages
        for member in (*stage.ranks, *stage.replicas)
    }
    named |= {pipeline.move.to.node for pipeline in topology.pipelines if pipeline.move is not None}
    stop = set(topology.leaving) - named
    run = {*all_nodes(config), *wanted_nodes(topology, config.stages, config.spares)} - stop
    return Wanted(_nodes(run), _nodes(stop))


def _nodes(names: Iterable[str]) -> tuple[NodeId, ...]:
    """Those that are nodes' names, n2 before n10."""
    return tuple(sorted((name for name in names if number_of(name) >= 0), key=number_of))


def _homes(topology: Topology, closing: bool = True) -> set[NodeId]:
    return {
        home
        for pipeline in topology.pipelines
        if closing or not pipeline.closing
        for stage in pipeline.stages
        for home in stage.homes
    }


def _lowest(stage: int, stages: int, wanted: int, taken: set[NodeId]) -> list[NodeId]:
    """The lowest numbers of a stage that are not taken."""
    names = (f"n{number}" for number in count(stage, stages))
    return list(islice((name for name in names if name not in taken), wanted))
