"""restart: one process after the other, each by means that exist for a single one.

A node is replaced by a fresh process of itself (replace.py). Controllers and gateways hold nothing that others need:
they are retired, and whoever supervises them starts a fresh one; the leader hands leadership over before. The next
turn begins when the fresh process is back in place and, for a node, every copy of its stage has caught up: so no stage
ever has two nodes missing. `Operation.turn` is in etcd, so that a new leader goes on where the old one was.

One instance alone can be restarted: a canary, which the others run beside until it is kept (the rest is restarted, too)
or rolled back (what was installed before is installed again, and it is restarted once more).

Fresh is not enough: each has to be made of the code and the settings that were asked for, else of the same as the
others. A restart that finds another one fails there, before more of the cluster has become a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as judged

from msgspec.structs import replace

from controlplane.contract.ids import Member, NodeId
from controlplane.contract.records import Operation, OperationKind, ProcessKind, RestartScope, Target
from controlplane.contract.status import Check, OperationRequest
from controlplane.contract.topology import Mode, Topology
from controlplane.core.edit import successor
from controlplane.core.kinds.kind import LEADER, Kind
from controlplane.core.kinds.nodes import duties
from controlplane.core.kinds.replace import Replace
from controlplane.core.placement import able, free_members
from controlplane.core.policy import Situation


class Restart(Kind):
    __slots__ = ()
    kind = OperationKind.RESTART
    done_words = "{node}: every process is a fresh one, of the same code and settings"

    @classmethod
    def declared(cls, op: Operation, request: OperationRequest, s: Situation) -> Operation:
        return replace(op, targets=targets(s, op.node), version=request.version, settings=request.settings)

    def claims(self) -> frozenset[str]:
        return frozenset({LEADER, *(target.member.node for target in self.op.targets)})

    # -- before it begins ---------------------------------------------------------------------------------

    def checks(self, s: Situation) -> Iterator[Check]:
        scope, found = self.op.node, self.op.targets
        instance = s.topology.pipeline(scope)
        if scope not in set(RestartScope) and instance is None:
            yield Check("fail", "scope", f"{scope!r} is none of {', '.join(RestartScope)}, nor an instance")
            return
        if instance is not None and instance.closing:
            yield Check("fail", "scope", f"{scope} is to go: its nodes end anyway")
            return
        if not found:
            yield Check("fail", "scope", f"no process of {scope} is registered")
            return
        kinds = [target.kind for target in found]
        counts = ", ".join(f"{kinds.count(kind)} {kind.value}s" for kind in ProcessKind if kind in kinds)
        yield Check("ok", "processes", f"{counts}, one after the other")
        if s.topology.paused:
            yield Check("warn", "paused", "automation is paused: nothing moves until it is resumed")
        if s.topology.mode is Mode.STOP_RESTART and ProcessKind.NODE in kinds:
            yield Check("fail", "mode", "mode stop-restart moves nothing")
        if kinds.count(ProcessKind.CONTROLLER) == 1:
            yield Check("warn", "leader", "nobody leads while the only controller restarts")
        if kinds.count(ProcessKind.GATEWAY) == 1:
            yield Check("warn", "gateways", "clients of the only gateway have to connect again")
        yield from _stages(s, [target.member.node for target in found if target.kind is ProcessKind.NODE])

    def plan(self, s: Situation) -> Iterator[str]:
        served = duties(s.topology)
        for target in self.op.targets:
            name = target.member.node
            match target.kind:
                case ProcessKind.NODE:
                    places = ", ".join(f"{p.id}/{i}" for p, i in served.get(name, ()))
                    yield f"move {places} off {name}, restart it, hand back" if places else f"restart {name}"
                case ProcessKind.CONTROLLER if name in s.policy.peers.candidates[:1]:
                    yield f"transfer leadership, restart {name}"
                case _:
                    yield f"restart {name}"

    # -- while it is under way ----------------------------------------------------------------------------

    @property
    def present(self) -> Target | None:
        """Whose turn it is."""
        op = self.op
        return op.targets[op.turn] if 0 <= op.turn < len(op.targets) else None

    @property
    def moves_nodes(self) -> bool:
        return any(target.kind is ProcessKind.NODE for target in self.op.targets)

    def stands_as(self) -> Operation:
        """During a node's turn, that node's replacement."""
        target = self.present
        if target is None or target.kind is not ProcessKind.NODE:
            return self.op
        member = target.member
        return replace(self.op, kind=OperationKind.REPLACE, node=member.node, incarnation=member.incarnation)

    def edit(self, s: Situation) -> Topology | None:
        """Retire the controller or gateway whose turn it is."""
        target = self.present
        if target is None or target.member in s.topology.retired or self._leader_is_next(s):
            return None
        if target.kind is ProcessKind.NODE or s.policy.peers.find(target.member.node) != target.member:
            return None
        return successor(s.topology, retired=(*s.topology.retired, target.member))

    def _leader_is_next(self, s: Situation) -> bool:
        """Whether it is the turn of the very controller that leads, and somebody else could."""
        target = self.present
        if target is None or target.member.node != s.policy.me:
            return False
        others = any(name != s.policy.me for name in s.policy.peers.candidates)
        return others and s.policy.peers.find(s.policy.me) == target.member

    def should_resign(self, s: Situation) -> str:
        if s.topology.paused or not self._leader_is_next(s):
            return ""
        return f"it is to be restarted ({self.op.id})"

    # -- how far it is ------------------------------------------------------------------------------------

    def advanced(self, s: Situation) -> Operation:
        """One turn further, if the present one is over."""
        target = self.present
        over = target is not None and not s.topology.paused and self._over(s, target)
        return replace(self.op, turn=self.op.turn + 1) if over else self.op

    def _over(self, s: Situation, target: Target) -> bool:
        name = target.member.node
        match target.kind:
            case ProcessKind.NODE:
                view = s.nodes.views.get(name)
                fresh = Replace(self.stands_as()).is_done(s)
                return fresh and view is not None and _protected(s, view.record.stage)
            case ProcessKind.CONTROLLER:  # it stands for election once it knows the cluster
                return _fresh(s, target) and name in s.policy.peers.candidates
            case ProcessKind.GATEWAY:
                return _fresh(s, target)

    def amiss(self, s: Situation) -> str:
        """What the fresh processes are made of that they should not be. The one whose turn it is counts from its
        registration on: it may never be fit to end its turn."""
        op = self.op
        made = {name: (version, settings) for name, version, settings in s.policy.peers.made_of}
        fresh = [target for target in op.targets[: op.turn + 1] if _fresh(s, target)]
        views = {t.member.node: s.nodes.views[t.member.node] for t in fresh if t.kind is ProcessKind.NODE}
        made |= {name: (view.record.version, view.record.settings) for name, view in views.items()}
        restarted = [target.member.node for target in fresh if target.member.node in made]
        told = [f"{name} cannot serve: {view.why_not}" for name, view in views.items() if view.unfit]
        for column, (what, wanted) in enumerate((("code", op.version), ("settings", op.settings))):
            having: dict[str, list[str]] = {}
            for name in restarted:
                having.setdefault(made[name][column] or "unknown", []).append(name)
            if wanted:
                wrong = {found: who for found, who in having.items() if found != wanted}
                told += [
                    f"{', '.join(who)} came back with {what} {it}, not {wanted}" for it, who in wrong.items()
                ]
            elif len(having) > 1:
                told.append(
                    f"mixed {what}: " + ", ".join(f"{it} in {', '.join(who)}" for it, who in having.items())
                )
        if not told:
            return ""
        return f"{'; '.join(told)}: install the same on every host, restart its launcher, and restart again"

    def is_done(self, s: Situation) -> bool:
        return self.op.turn >= len(self.op.targets)

    def doing(self, s: Situation) -> str:
        """The turn of a controller or gateway: in a node's turn it stands as a replacement."""
        target = self.present
        if target is None:
            return "nearly done"
        if self._leader_is_next(s):
            return f"{target.member.node} hands leadership over first"
        return f"waiting for a fresh process of {target.member.node}"

    def counted(self, message: str) -> str:
        target = self.present
        if target is None:
            return message
        return f"{self.op.turn + 1} of {len(self.op.targets)}, {target.member.node}: {message}"


def targets(s: Situation, scope: str) -> tuple[Target, ...]:
    """Who runs now: controllers (the leader last), then nodes, then gateways: nodes refuse gateways of newer code. Of
    an instance its home nodes; none, where there is no such scope."""
    peers = s.policy.peers
    leader = peers.candidates[:1]
    found: list[Target] = []
    if scope in (RestartScope.CONTROLLERS, RestartScope.ALL):
        last = sorted(peers.controllers, key=lambda m: (m.node in leader, m))
        found += [Target(ProcessKind.CONTROLLER, m) for m in last]
    if scope in (RestartScope.NODES, RestartScope.ALL):
        live = sorted(s.nodes.views.items(), key=lambda item: (len(item[0]), item[0]))
        found += [Target(ProcessKind.NODE, view.member) for _, view in live if view.registered]
    elif (instance := s.topology.pipeline(scope)) is not None:
        homes = [s.nodes.views.get(home) for stage in instance.stages for home in stage.homes]
        found += [
            Target(ProcessKind.NODE, view.member) for view in homes if view is not None and view.registered
        ]
    if scope in (RestartScope.GATEWAYS, RestartScope.ALL):
        found += [Target(ProcessKind.GATEWAY, m) for m in sorted(peers.gateways)]
    return tuple(found)


def _fresh(s: Situation, target: Target) -> bool:
    name = target.member.node
    if target.kind is ProcessKind.NODE:
        newest = s.nodes.views[name].member if name in s.nodes.views else None
    else:
        newest = s.policy.peers.find(name)
    return newest is not None and newest != target.member


def _protected(s: Situation, stage: int) -> bool:
    """Every pipeline's stage is served, rests, and has a copy that has caught up where anybody could hold one."""
    free: list[Member] | None = None  # most have a copy, and nobody asks who else could hold one
    for pipeline in s.topology.pipelines:
        if not 0 <= stage < len(pipeline.stages):  # where a topology is not what it should be
            continue
        place, move = pipeline.stages[stage], pipeline.move
        if not place.ranks or (move is not None and move.stage == stage):
            return False
        live = [m for m in place.replicas if not s.nodes.is_dead(m)]
        if s.topology.mode is not Mode.REPLICATE or any(s.near(pipeline, stage, copy) for copy in live):
            continue
        free = free_members(s, stage) if free is None else free
        if any(able(s, pipeline, m) and s.nodes.exchange(place.leader, m) for m in free):
            return False
    return True


def _stages(s: Situation, nodes: list[str]) -> Iterator[Check]:
    """Whether each node could be emptied, were it alone avoided. Who is only suspected may be well by then."""
    stuck: list[str] = []
    later: list[str] = []
    served = duties(s.topology)
    # What is true of a node whoever is restarted is found out once.
    free = {stage: free_members(s, stage) for stage in s.nodes.by_stage}
    living = {stage: _living(s, stage) for stage in s.nodes.by_stage}
    for node in nodes:
        if node not in served:
            continue
        alone = s if node in s.avoid else judged(s, avoid=s.avoid | {node})
        for pipeline, index in served[node]:
            if any(able(alone, pipeline, m) for m in free.get(index, ())):
                continue
            inside = {node, *(member.node for member in pipeline.members())}
            could = any(other not in inside for other in living.get(index, ()))
            (later if could else stuck).append(f"{node} ({pipeline.id}/{index})")
    if stuck:
        yield Check("fail", "stages", f"nobody else can serve what these do: {', '.join(stuck)}")
    elif later:
        yield Check(
            "warn", "stages", f"nobody could take over just now, and they would wait: {', '.join(later)}"
        )
    elif nodes:
        yield Check("ok", "stages", "each node's duties can be taken over while it restarts")


def _living(s: Situation, stage: int) -> list[NodeId]:
    return [
        node
        for node, view in s.nodes.by_stage[stage].items()
        if view.registered and not s.nodes.is_dead(view.member) and node not in s.avoid
    ]
