"""A group of nodes as plain values, for direct calls of the planner: no processes, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord, Operation
from controlplane.contract.reports import NodeReport, PipelineReport, TargetReport
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Mode, Topology
from controlplane.core.edit import initial
from controlplane.core.membership import Nodes, NodeView
from controlplane.core.operations import progress, survey
from controlplane.core.plan import Transition, plan
from controlplane.core.policy import Limits, Policy, Situation, Timers

LIMITS = Limits()


def make_config(
    instances: int = 2, stages: int = 2, spares: int = 0, mode: Mode = Mode.REPLICATE
) -> ClusterConfig:
    return ClusterConfig(
        run_dir="run",
        model="model",
        etcd=("127.0.0.1:1",),
        instances=instances,
        stages=stages,
        spares=spares,
        mode=mode,
    )


def make_record(
    config: ClusterConfig,
    node: str,
    incarnation: str,
    stage: int,
    *,
    digest: str = "",
    domain: dict[str, str] | None = None,
    numerics: str = "",
) -> NodeRecord:
    return NodeRecord(
        member=Member(node, incarnation),
        group=config.group,
        stage=stage,
        num_stages=config.stages,
        link_address="127.0.0.1:1",
        rpc_address="127.0.0.1:2",
        weights_digest=digest or f"weights-{stage}",
        pool_blocks=100,
        block_size=config.engine.block_size,
        pid=1,
        fault_domain=domain or {},
        numerics=numerics,
    )


@dataclass
class World:
    """Nodes that report what a healthy data plane would: copies catch up."""

    config: ClusterConfig
    topology: Topology = field(init=False)
    records: dict[str, NodeRecord] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    yellow: set[str] = field(default_factory=set)
    demoted: set[str] = field(default_factory=set)  # on probation
    operations: dict[str, Operation] = field(default_factory=dict)
    running: int = 1
    lag: int = 0  # of every copy
    silent: bool = False  # nobody says anything of copies
    now: float = 1000.0
    history: list[str] = field(default_factory=list)
    timers: Timers = field(default_factory=lambda: Timers(LIMITS))
    _numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.topology = initial(self.config, 1)
        self.timers.note(self.topology, self.now)
        total = self.config.instances * self.config.stages + self.config.spares * self.config.stages
        for k in range(total):
            self.start(f"n{k}")

    @property
    def all_nodes(self) -> list[str]:
        return list(self.records)

    def start(self, node: str, **more: object) -> Member:
        """A fresh process of a node registers."""
        stage = int(node[1:]) % self.config.stages
        self.records[node] = make_record(self.config, node, f"i{next(self._numbers)}", stage, **more)  # type: ignore[arg-type]
        self.alive.add(node)
        return self.records[node].member

    def kill(self, *nodes: str) -> None:
        self.alive.difference_update(nodes)

    def member(self, node: str) -> Member:
        return self.records[node].member

    def nodes(self) -> Nodes:
        views = {}
        for node, record in sorted(self.records.items()):
            alive = node in self.alive
            state = (
                NodeState.RED if not alive else NodeState.YELLOW if node in self.yellow else NodeState.GREEN
            )
            why_not = "" if alive else "dead"
            demoted = node in self.demoted
            views[node] = NodeView(record, state, alive, state is NodeState.GREEN, why_not, demoted)
        dead = frozenset(r.member for n, r in self.records.items() if n not in self.alive)
        return Nodes(views, dead, self.reports())

    def reports(self) -> dict[Member, NodeReport]:
        said: dict[Member, list[PipelineReport]] = {r.member: [] for r in self.records.values()}
        for pipeline in self.topology.pipelines:
            move = pipeline.move
            for index, stage in enumerate(pipeline.stages):
                targets = list(stage.replicas)
                if move is not None and move.stage == index and move.to not in targets:
                    targets.append(move.to)
                report = PipelineReport(
                    pipeline=pipeline.id,
                    epoch=pipeline.epoch,
                    stage=index,
                    last_step=7,
                    running=self.running if index == 0 else 0,
                    targets=() if self.silent else tuple(TargetReport(t, self.lag) for t in targets),
                )
                for member in stage.ranks:
                    said.setdefault(member, []).append(report)
        counter = self.topology.counter
        return {m: NodeReport(m, 1, 0.0, 1, tuple(r), topology_counter=counter) for m, r in said.items()}

    def policy(self) -> Policy:
        return Policy(self.config, self.timers, self.operations, LIMITS)

    def situation(self) -> Situation:
        return survey(self.topology, self.nodes(), self.policy(), self.now)

    def next(self) -> Transition | None:
        return plan(self.topology, self.nodes(), self.policy(), self.now)

    def step(self) -> str | None:
        """Take the next step and look at the operations; the rule that made it."""
        transition = self.next()
        if transition is not None:
            self.topology = transition.topology
            self.timers.note(self.topology, self.now)
            self.history.append(transition.rule)
        for op in self.operations.values():
            self.operations[op.id] = progress(self.situation(), op, self.now)
        return None if transition is None else transition.rule

    def settle(self, limit: int = 200) -> int:
        """Steps until nothing is left to do, waiting out every pause; fails if that takes for ever."""
        steps = 0
        waited = 0
        while waited < 2:
            if self.step() is not None:
                steps, waited = steps + 1, 0
                assert steps <= limit, f"no end: {self.history[-20:]}"
            else:
                self.now += 16.0  # longer than every grace
                waited += 1
        return steps

    def serving(self) -> dict[str, str]:
        """ "p0/1" -> node, or "-"."""
        return {
            f"{p.id}/{i}": stage.leader.node if stage.leader else "-"
            for p in self.topology.pipelines
            for i, stage in enumerate(p.stages)
        }

    def copies(self) -> dict[str, list[str]]:
        return {
            f"{p.id}/{i}": [m.node for m in stage.replicas]
            for p in self.topology.pipelines
            for i, stage in enumerate(p.stages)
        }

    def all_home(self) -> bool:
        """Everybody serves as the newest process at home, nothing moves, the copies follow the ring."""
        size, width = self.config.instances, self.config.stages
        for i, pipeline in enumerate(self.topology.pipelines):
            for s, stage in enumerate(pipeline.stages):
                if stage.ranks != tuple(self.member(h) for h in stage.homes) or pipeline.move is not None:
                    return False
                wanted = [f"n{(i + 1) % size * width + s}"] if size > 1 else []
                copies = [m.node for m in stage.replicas]
                if self.config.mode is Mode.REPLICATE and not self.config.spares and copies != wanted:
                    return False
        return True
