"""scale: another number of instances, while all of them serve.

More: pipelines with new homes; they serve as soon as their nodes have joined. Fewer: the last ones take no new request,
their stages move off the nodes that are to end, and each is gone once its streams have ended (closing.py). All of it is
in the topology: who leads next goes on, and an operation that is cancelled leaves no instance half gone, since to ask
for the old number again takes it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as judged
from itertools import count

from msgspec.structs import replace

from controlplane.contract.config import instances_max
from controlplane.contract.hosting import free_homes, wanted_nodes
from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.status import Check, OperationRequest
from controlplane.contract.topology import Mode, Pipeline, Topology
from controlplane.core.closing import may_end, moved_away
from controlplane.core.edit import successor, unformed
from controlplane.core.kinds.kind import INSTANCES, Kind
from controlplane.core.placement import able, free_members
from controlplane.core.policy import Situation


class Scale(Kind):
    __slots__ = ()
    kind = OperationKind.SCALE
    done_words = "the group has {instances} instances"

    @classmethod
    def declared(cls, op: Operation, request: OperationRequest, s: Situation) -> Operation:
        return replace(op, instances=request.instances)

    def claims(self) -> frozenset[str]:
        return frozenset({INSTANCES})

    # -- before it begins ---------------------------------------------------------------------------------

    def checks(self, s: Situation) -> Iterator[Check]:
        wanted = self.op.instances
        if why := self.amiss(s):
            yield Check("fail", "instances", why)
            return
        after = scaled(s, wanted)
        if after is None:
            yield Check("warn", "instances", f"the group has {wanted} instances already: nothing to do")
            return
        if s.topology.paused:
            yield Check("warn", "paused", "automation is paused: nothing changes until it is resumed")
        yield from self._nodes_come(s, after)
        yield from self._streams_go(s, after)
        if s.topology.mode is Mode.REPLICATE and wanted == 1 and not s.policy.config.spares:
            yield Check("warn", "protection", "nothing will hold copies of the only instance")

    def _nodes_come(self, s: Situation, after: Topology) -> Iterator[Check]:
        known = {p.id for p in s.topology.pipelines}
        new = [home for p in after.pipelines if p.id not in known for home in _homes(p)]
        missing = [node for node in new if s.nodes.usable(node) is None]
        if missing:
            yield Check(
                "ok",
                "nodes",
                f"{', '.join(missing)} have to join: launchers that follow the group start them",
            )
        elif new:
            yield Check("ok", "nodes", f"{', '.join(new)} are there already")

    def _streams_go(self, s: Situation, after: Topology) -> Iterator[Check]:
        leaving = set(after.leaving)
        later = judged(s, avoid=s.avoid | leaving)
        free = {stage: free_members(later, stage) for stage in s.nodes.by_stage}
        for pipeline in _closing(after):
            streams = s.nodes.load(pipeline) + s.nodes.queued(pipeline)
            stuck = [
                f"{pipeline.id}/{index}"
                for index, stage in enumerate(pipeline.stages)
                if stage.leader is not None
                and stage.leader.node in leaving
                and not any(able(later, pipeline, m) for m in free.get(index, ()))
            ]
            if stuck and s.topology.mode is not Mode.STOP_RESTART:
                yield Check("fail", "stage", f"nobody who stays can take over {', '.join(stuck)}")
            else:
                yield Check("ok", "streams", f"{pipeline.id} has {streams} streams: each goes on to its end")

    def plan(self, s: Situation) -> Iterator[str]:
        after = scaled(s, self.op.instances)
        if after is None:
            return
        known = {p.id: p for p in s.topology.pipelines}
        for pipeline in after.pipelines:
            before = known.get(pipeline.id)
            if before is None:
                yield f"add {pipeline.id} on {', '.join(_homes(pipeline))}"
            elif before.closing and not pipeline.closing:
                yield f"keep {pipeline.id} after all"
            elif pipeline.closing and not before.closing:
                yield f"{pipeline.id} takes no new request"
        already = set(s.topology.leaving)
        if leaving := [node for node in after.leaving if node not in already]:
            yield f"move what is on {', '.join(leaving)} away, KV included; they end"
        for pipeline in _closing(after):
            yield f"{pipeline.id} is gone when its streams have ended"

    # -- while it is under way ----------------------------------------------------------------------------

    def edit(self, s: Situation) -> Topology | None:
        return scaled(s, self.op.instances)

    # -- how far it is ------------------------------------------------------------------------------------

    def amiss(self, s: Situation) -> str:
        """What no pre-flight has let through may stand in etcd all the same."""
        return _refused(s, self.op.instances)

    def is_done(self, s: Situation) -> bool:
        if scaled(s, self.op.instances) is not None or _closing(s.topology) or not may_end(s.topology):
            return False
        return all(p.up for p in s.topology.pipelines)

    def doing(self, s: Situation) -> str:
        if moving := moved_away(s.topology):
            return moving
        for pipeline in s.topology.pipelines:
            if not pipeline.closing and not pipeline.up:
                missing = [home for home in _homes(pipeline) if s.nodes.usable(home) is None]
                waits = f"waits for {', '.join(missing)} to join" if missing else "forms"
                return f"{pipeline.id} {waits}"
        for pipeline in _closing(s.topology):
            return f"{pipeline.id} goes when its streams have ended"
        return "nodes that are to end hold the last copies" if not may_end(s.topology) else "nearly done"


def scaled(s: Situation, instances: int) -> Topology | None:
    """The group with so many instances; None: it has them, or cannot have so many. Those that were to go stay first, in
    their order; those that go are the last ones."""
    if _refused(s, instances):
        return None
    before, stages, spares = s.topology, s.policy.config.stages, s.policy.config.spares
    stay = [p for p in before.pipelines if not p.closing]
    going = [p for p in before.pipelines if p.closing]
    more = instances - len(stay)
    if more == 0:
        return None
    if more < 0:
        changed = [replace(p, closing=True) for p in stay[instances:]]
        after = successor(before, *changed)
        surplus = wanted_nodes(before, stages, spares) - wanted_nodes(after, stages, spares)
        return successor(before, *changed, leaving={*before.leaving, *surplus})
    back = [replace(p, closing=False) for p in going[:more]]
    after = successor(before, *back)
    homes = free_homes(after, stages, more - len(back))
    added = [unformed(name, nodes) for name, nodes in zip(_names(before), homes, strict=False)]
    after = successor(before, *back, added=added)
    return successor(
        before, *back, added=added, leaving=set(before.leaving) - wanted_nodes(after, stages, spares)
    )


def _refused(s: Situation, instances: int) -> str:
    """Why the group cannot have so many instances; "" if it can."""
    most = instances_max(s.policy.config.stages)
    if not 1 <= instances <= most:
        return f"{instances} instances: allowed are 1 to {most}"
    if s.topology.mode is Mode.PARITY and instances < 2:
        return "mode parity keeps the parity of an instance on nodes of others: 2 at least"
    return ""


def _names(topology: Topology) -> Iterator[str]:
    """Names that no pipeline has."""
    taken = {p.id for p in topology.pipelines}
    return (name for k in count() if (name := f"p{k}") not in taken)


def _closing(topology: Topology) -> list[Pipeline]:
    return [p for p in topology.pipelines if p.closing]


def _homes(pipeline: Pipeline) -> list[NodeId]:
    return [home for stage in pipeline.stages for home in stage.homes]
