"""One run: a cluster forms, a schedule happens to it, the faults stop, and full service has to return."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from controlplane.contract.auth import ADMIN_CALLER
from controlplane.contract.errors import Unavailable
from controlplane.contract.hosting import wanted_here
from controlplane.contract.keys import Keys
from controlplane.contract.status import OperationRequest
from tests.sim import parts, relays
from tests.sim.border import simulated
from tests.sim.checks import Checks, picture
from tests.sim.drafts import guessed, has_drafts
from tests.sim.etcd import SimEtcd
from tests.sim.network import Network
from tests.sim.requests import Stream, template
from tests.sim.schedule import Schedule
from tests.sim.world import OURS, Process, World

FORM_LIMIT_S = 15.0
# Virtual; ends and leases, silences and steadiness, orphans and hand-backs one after another.
SETTLE_LIMIT_S = 45.0
LOOK_S = 0.25
LAUNCH_S = 0.3  # between two looks of a launcher
OPERATOR_S = 1.0  # between two looks of the operator who wants everything as on the first day


@dataclass
class Outcome:
    seed: int
    failure: str = ""  # the first violation; empty: none
    faults: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)  # by how they ended
    topologies: int = 0
    events: int = 0
    virtual_s: float = 0.0
    digest: int = 0  # of the moments at which anything happened: equal for equal runs


def run(
    schedule: Schedule,
    log: Callable[[str], None] | None = None,
    without: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Outcome:
    """Play a schedule. `without` switches a safeguard of production code off meanwhile."""
    parts.run_dir()  # made before: it draws a secret
    world = World(schedule.seed)
    world.log = log
    net = Network(world)
    with without(), simulated(world, net), guessed(schedule.shape.stages):
        cluster = Cluster(world, net, schedule)
        with cluster.checks.probes():
            cluster.play()
        return cluster.outcome


class Cluster:
    def __init__(self, world: World, net: Network, schedule: Schedule) -> None:
        shape = schedule.shape
        self.world, self.net, self.schedule = world, net, schedule
        self.outcome = Outcome(schedule.seed)
        self.etcd = SimEtcd(world, net)
        self.config = parts.make_config(
            self.etcd.endpoints,
            shape.instances,
            shape.stages,
            shape.spares,
            shape.pool_blocks,
            shape.microbatches,
            "ngram" if has_drafts(schedule.seed) else "off",
            shape.code,
            shape.parities,
            shape.mode,
        )
        self.checks = Checks(world, self.etcd, Keys.of(self.config), self.config.group)
        self.processes: dict[str, Process] = {}
        self.streams: dict[int, Stream] = {}
        self.cuts: list[list[tuple[str, str]]] = []
        self.incarnations = 0
        self.strangers: list[Process] = []  # second processes of a name, on other hosts
        self.clashed: set[str] = set()  # names that ever had one
        self.codes: dict[str, int] = {}  # whose code is newer, or was
        self.newest = OURS  # that ever ran
        self.operations = 0
        self.asked = 0  # questions to controllers
        self.asking: dict[int, tuple[Process, str]] = {}  # those that are not answered, of whom
        self.scales = any(step.what == "scale" for step in schedule.steps)
        self.stopped: set[str] = set()  # nodes that their launcher has ended for good
        self.healing = False
        # What befalls the cluster is done by somebody who has no process of his own in it.
        self.fate = world.process("fate")
        for name in self.names():
            self.start(name)
        if self.scales:
            self.world.post(LAUNCH_S, self.fate, self._launch)

    def names(self) -> list[str]:
        """Who should run."""
        shape, topology = self.schedule.shape, self.checks.topology
        nodes = shape.nodes
        if self.scales and topology is not None:
            nodes = list(wanted_here(topology, self.config).run)
        controllers = [f"c{k + 1}" for k in range(shape.controllers)]
        return [
            *controllers,
            *relays.names(shape),
            *nodes,
            *(f"g{k + 1}" for k in range(shape.gateways)),
        ]

    # ------------------------------------------------------------------ phases

    def play(self) -> None:
        world = self.world
        self._wait(FORM_LIMIT_S, "the cluster has not formed", self._at_home)
        begun = world.now
        self.checks.calm = self.schedule.calm
        for step in self.schedule.steps:
            world.run_until(begun + step.at)
            if world.failure:
                break
            world.note(f"step {step.what} {step.args}")
            getattr(self, step.what)(*step.args)
            if step.what not in ("submit", "cancel"):
                self.outcome.faults[step.what] += 1
        self._settle()
        outcome = self.outcome
        outcome.faults.update({f"frame {how}": n for how, n in self.net.tampered.items()})
        outcome.faults.update({f"write {how}": n for how, n in self.etcd.fated.items()})
        outcome.requests = Counter(stream.ended or "open" for stream in self.streams.values())
        outcome.topologies, outcome.events = self.checks.written, world.events
        outcome.virtual_s, outcome.failure, outcome.digest = world.now, world.failure, world.digest

    def _settle(self) -> None:
        """The faults stop. Safety is behind us; now liveness."""
        world = self.world
        world.run_until(world.now + 0.3)
        self.healing = True
        world.note("the faults stop")
        self._heal()
        if self.schedule.mild:
            self._wait(SETTLE_LIMIT_S, "requests have not ended", self._all_ended)
            for stream in self.streams.values():
                if not stream.well and not world.failure:
                    world.fail(f"request {stream.rid} ended with {stream.ended!r} through one fault")
        self._wait(SETTLE_LIMIT_S, "full service has not returned", self._at_home, self._operator)
        probes = [self._submit(-1 - k, k % self.schedule.shape.gateways + 1, 10 + k) for k in range(2)]
        self._wait(SETTLE_LIMIT_S, "requests have not ended", self._all_ended)
        for stream in probes:
            if not stream.well:
                world.fail(f"request {stream.rid} ended with {stream.ended!r} although all is well")
        self._wait(SETTLE_LIMIT_S, "something is left behind", lambda: not self._left_behind())

    def _wait(
        self, limit_s: float, what: str, condition: Callable[[], Any], every: Callable[[], None] | None = None
    ) -> None:
        world = self.world
        deadline, next_look = world.now + limit_s, world.now
        while not world.failure and not condition():
            if world.now >= deadline:
                world.fail(f"{what} within {limit_s:g} s: {self._situation()}")
                return
            if every is not None and world.now >= next_look:
                next_look = world.now + OPERATOR_S
                every()
            world.run_until(world.now + LOOK_S)

    def _situation(self) -> str:
        topology = self.checks.topology
        open_ = [s.rid for s in self.streams.values() if not s.ended]
        shown = picture(topology) if topology is not None else "no topology"
        return f"{shown}; open requests {open_}; left: {self._left_behind()}"

    # ------------------------------------------------------------------ looking

    def nodes(self) -> Iterator[tuple[str, Any]]:
        for name, process in self.processes.items():
            if name[0] == "n" and process.alive and process.part is not None:
                yield name, process.part

    def _at_home(self) -> bool:
        """Every stage is served by the living process of its home, is copied, and nothing moves or is about to."""
        topology = self.checks.topology
        if topology is None or topology.cordoned or topology.retired or self._asking() or self._under_way():
            return False
        if len(topology.pipelines) != self.schedule.shape.instances or any(map(self._runs, topology.leaving)):
            return False
        for pipeline in topology.pipelines:
            if not pipeline.up or pipeline.move is not None or pipeline.closing:
                return False
            for stage in pipeline.stages:
                leader = stage.leader
                if leader is None or leader.node not in stage.homes or not self._lives(leader):
                    return False
                if self.schedule.shape.code or self.schedule.shape.mode:
                    continue
                if not stage.replicas or not all(self._lives(m) for m in stage.replicas):
                    return False
        return all(self._reachable(name) for name in self.names() if name[0] == "g")

    def _lives(self, member: Any) -> bool:
        process = self.processes[member.node]
        return process.alive and process.incarnation == member.incarnation

    def _runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].alive

    def _reachable(self, gateway: str) -> bool:
        part = self.processes[gateway].part
        topology = self.checks.topology
        return part is not None and topology is not None and part.reachable == len(topology.pipelines)

    def _all_ended(self) -> bool:
        return all(stream.ended for stream in self.streams.values())

    def _unaccounted(self, pipeline: str, cached: set[bytes]) -> list[str]:
        """Stages that keep other blocks than the scheduler has cached."""
        topology = self.checks.topology
        served = topology.pipeline(pipeline) if topology is not None else None
        leaders = {member.node for member in served.members()} if served is not None else set()
        found = []
        for name, node in self.nodes():
            store = parts.store_of(node)
            kept = store.kept[pipeline].keys()
            if name in leaders and kept != cached:
                many, few = len(kept - cached), len(cached - kept)
                found.append(f"{name} keeps {many} blocks of {pipeline} too many, lacks {few}")
        return found

    def _left_behind(self) -> list[str]:
        """Blocks, requests, questions and slots that nobody will ask for again."""
        found = []
        for name, node in self.nodes():
            store = parts.store_of(node)
            store.check()
            for pipeline, rids in store.own.items():
                found += [f"{name} serves {rid:x} of {pipeline}" for rid in rids]
            found += [f"{name} has a copy of {rid:x} of {pipeline}" for pipeline, rid in store.copies.rows]
            kept = {key for names in (*store.kept.values(), store.copies.spare) for key in names}
            if store.table.rows_in_use or store.blocks_free + len(kept) != store.num_blocks:
                found.append(f"{name} has {store.table.rows_in_use} rows, {store.blocks_free} free blocks")
            for pipeline, scheduler in parts.schedulers_of(node).items():
                if scheduler.requests or scheduler.batcher.used_blocks or scheduler.steps:
                    found.append(f"{name} schedules {list(scheduler.requests)} of {pipeline}")
                if placed := parts.placed_of(scheduler):
                    found.append(f"{name} counts copies of {placed} of {pipeline}")
                found += self._unaccounted(pipeline, parts.cached_of(scheduler))
            for pipeline, stage in parts.stages_of(node).items():
                if stage.sampling is not None and stage.sampling.slots_in_use:
                    found.append(f"{name} samples {stage.sampling.slots_in_use} of {pipeline}")
            found += self._unprotected(name, node)
            for pipeline, source in parts.sources_of(node):
                if parts.acknowledged_of(source):
                    found.append(f"{name} counts {parts.acknowledged_of(source)} of {pipeline}")
        found += self._unasked()
        for name in self.names():
            # A node may have been asked for just now, and not been started yet.
            part = self.processes[name].part if name[0] == "g" else None
            if part is not None and part.live:
                found.append(f"{name} has {part.live} live requests")
        return found

    def _unprotected(self, name: str, node: Any) -> list[str]:
        """Blocks without parity, though there is room; and what a node has not given back of its work."""
        parity, found = parts.parity_of(node), []
        if not self.schedule.shape.parity_blocks:
            lags = {pipeline: source.lag_blocks for pipeline, source in parity.sources.items()}
            found += [f"{name} has {lag} blocks of {p} without parity" for p, lag in lags.items() if lag]
        if parity.encoding.encoder._jobs or parity.encoding.bytes.restored or parity.restorer.pipelines:
            found.append(f"{name} restores something")
        held = sum(len(part) for each in parity.encoding.bytes.parities.values() for part in each)
        if held != parity.encoding.encoder.used_bytes or held > parity.encoding.encoder._room_bytes:
            found.append(
                f"{name} holds {held} bytes of parity, and counts {parity.encoding.encoder.used_bytes}"
            )
        return found

    def _unasked(self) -> list[str]:
        """Parity of what no scheduler has cached, or twice of the same."""
        cached = {
            pipeline: parts.cached_of(scheduler)
            for _, node in self.nodes()
            for pipeline, scheduler in parts.schedulers_of(node).items()
        }
        found = []
        for pipeline, names in cached.items():
            there = Counter(
                n for _, node in self.nodes() for n in parts.parity_of(node).encoding.encoder.names(pipeline)
            )
            if stale := there.keys() - names:
                found.append(f"there is parity of {len(stale)} blocks of {pipeline} that are not cached")
            # Without room at the new place the old one keeps it.
            if not self.schedule.shape.parity_blocks and (
                twice := sum(count > 1 for count in there.values())
            ):
                found.append(f"there is parity of {twice} blocks of {pipeline} on several nodes")
        return found

    # ------------------------------------------------------------------ processes

    def start(self, name: str) -> None:
        """The launcher's doing: a fresh process of that name, unless there is one."""
        if not self._runs(name) and name not in self.stopped:
            self.processes[name] = self._begin(name)

    def _launch(self) -> None:
        """Launchers follow the topology: they start who is wanted, and stop who has nothing left to do."""
        self.world.post(LAUNCH_S, self.fate, self._launch)
        topology = self.checks.topology
        if topology is None:
            return
        wanted = wanted_here(topology, self.config)
        for name in wanted.run:
            if name in self.stopped or name not in self.processes:
                self.stopped.discard(name)
                self.start(name)
        for name in wanted.stop:
            self.stopped.add(name)
            if self._runs(name) and not self.processes[name].paused:
                if self.processes[name].part is None:
                    self._end(self.processes[name])
                else:
                    self.leave(name)

    def _begin(self, name: str) -> Process:
        self.incarnations += 1
        process = self.world.process(name, f"{self.incarnations:x}")
        process.code = self.codes.get(name, OURS)
        process.exited = lambda: self.world.post(0.0, self.fate, self._exited, process)
        if name[0] == "n":
            relay = relays.address_for(name, self.schedule.shape)
            main = parts.node_main(
                process,
                self.config,
                int(name[1:]) % self.config.stages,
                relay,
                self.schedule.shape.parity_blocks,
            )
        elif name[0] == "r":
            main = parts.relay_main(process, self.config)
        elif name[0] == "c":
            main = parts.controller_main(process, self.config)
        else:
            main = parts.gateway_main(process, self.config)
        process.spawn(parts.named(main, process), True)
        return process

    def _exited(self, process: Process) -> None:
        """Its main coroutine has returned: retired, asked to stop, or another process has its name."""
        if not process.alive:
            return
        self._end(process)
        if process.fenced and process.name not in self.clashed:
            self.world.fail(f"{process} ended for another process of its name, and there never was one")
        if self.processes[process.name] is process:
            self.world.post(0.2, self.fate, self.start, process.name)

    def _end(self, process: Process) -> None:
        self.world.note(f"{process} ends")
        process.alive = False
        for call in process.at_end:
            call()
        self.net.died(process)
        if self.processes.get(process.name) is not process:
            return  # a stranger of that name, which no client knows
        for stream in self.streams.values():
            if stream.gateway == process.name and not stream.ended:
                stream.close("gateway lost")

    def _all(self) -> Iterable[Process]:
        yield from self.processes.values()
        for member in self.etcd.members:
            yield member.process

    def _named(self, name: str) -> Process:
        """A process by its name; "leader" is the controller that leads by its own account, or the first one."""
        if name == "leader":
            names = [n for n in self.processes if n[0] == "c"]
            led = (n for n in names if (p := self.processes[n].part) is not None and p.runtime.is_leader)
            name = next(led, names[0])
        return next(p for p in self._all() if p.name == name)

    # ------------------------------------------------------------------ healing

    def _heal(self) -> None:
        for pairs in self.cuts:
            self.net.heal(pairs)
        self.cuts.clear()
        self.net.delay_s = 0.0
        self.net.tamper.clear()
        self.etcd.fates.clear()
        self.etcd.refusing = ""
        for stranger in self.strangers:
            if stranger.alive:
                self._end(stranger)
        for name in self.names():  # what newer code has written needs newer code: all controllers get it
            if name[0] == "c" and self.codes.get(name, OURS) < self.newest:
                self.upgrade(name, self.newest)
        for member in self.etcd.members:
            self.etcd.start(member)
        for process in list(self._all()):
            if process.paused:
                process.resume()
        for name in self.names():
            self.start(name)
        self.net.broken_at_heal()

    def _operator(self) -> None:
        """Ends what is still under way, and lifts cordons."""
        topology = self.checks.topology
        service = self._service()
        if topology is None or service is None:
            return
        process, at = service
        for name, kind in self._under_way().items():
            if kind not in ("undrain", "scale"):
                self._ask(process, at.cancel(name, ADMIN_CALLER))
        if len([p for p in topology.pipelines if not p.closing]) != self.schedule.shape.instances:
            self.scale(self.schedule.shape.instances)
        for node in topology.cordoned:
            self.operations += 1
            request = OperationRequest(f"last-{self.operations}", "undrain", node)
            self._ask(process, at.submit(request, ADMIN_CALLER))

    def _under_way(self) -> dict[str, str]:
        """Operations that are not over, or that some controller does not know to be, with their kinds: one that nobody
        has begun yet will be, and moves what is at home."""
        known = [operation for _, at in self._services() for operation in at._operations()]
        return {operation.id: operation.kind for operation in known if operation.open}

    def _service(self) -> tuple[Process, Any] | None:
        """A controller that is there to be asked."""
        return next(self._services(), None)

    def _services(self) -> Iterator[tuple[Process, Any]]:
        for name, process in sorted(self.processes.items()):
            if name[0] == "c" and process.alive and not process.paused and process.part is not None:
                yield process, process.part.service

    def _ask(self, process: Process, question: Any) -> None:
        self.asked += 1
        number = self.asked
        self.asking[number] = process, process.incarnation

        async def asked() -> None:
            with contextlib.suppress(Unavailable):
                await question
            del self.asking[number]

        process.spawn(asked())

    def _asking(self) -> bool:
        """Whether a controller may still carry out what it was asked for."""
        return any(process.alive and process.incarnation == when for process, when in self.asking.values())

    # ------------------------------------------------------------------ steps: clients

    def submit(self, number: int, gateway: int, template_number: int) -> None:
        self._submit(number, gateway, template_number)

    def _submit(self, number: int, gateway: int, template_number: int) -> Stream:
        process = self.processes[f"g{gateway}"]
        asked = template(template_number)
        stream = Stream(self.world, template_number, self.schedule.shape.stages, process.name, self.world.now)
        self.streams[number] = stream
        if not process.alive or process.paused or process.part is None:
            stream.close("gateway lost")
            return stream

        def call() -> None:
            stream.rid = process.part.submit(stream, asked.prompt, asked.sampling)

        self.world.post(0.0, process, call)
        return stream

    def cancel(self, number: int) -> None:
        stream = self.streams.get(number)
        if stream is None or stream.ended:
            return
        process = self.processes[stream.gateway]

        def call() -> None:
            if not stream.ended:
                stream.close("cancelled")
                process.part.cancel(stream.rid, stream)

        self.world.post(0.0, process, call)

    # ------------------------------------------------------------------ steps: faults

    def kill(self, name: str, restart_s: float) -> None:
        process = self.processes[name]
        if process.alive:
            self._end(process)
            self.world.post(restart_s, self.fate, self.start, name)

    def leave(self, name: str) -> None:
        """SIGTERM of a node."""
        process = self.processes[name]
        if process.alive and process.part is not None:
            self.world.post(0.0, process, process.part.stop)

    def pause(self, name: str, seconds: float) -> None:
        process = self._named(name)
        if process.alive and not process.paused:
            process.paused = True
            self.world.post(seconds, self.fate, self._resume, process)

    def _resume(self, process: Process) -> None:
        if process.paused:
            process.resume()

    def isolate(self, name: str, seconds: float) -> None:
        others = [p.name for p in self._all() if p.name != name]
        self._cut([(name, o) for o in others] + [(o, name) for o in others], seconds)

    def cut(self, a: str, b: str, seconds: float) -> None:
        self._cut([(a, b), (b, a)], seconds)

    def one_way(self, a: str, b: str, seconds: float) -> None:
        self._cut([(a, b)], seconds)

    def hears_some(self, who: str, mask: int, breaks: int, both: int, seconds: float) -> None:
        """Reports of nodes that are not in the mask do not reach a controller; their streams break or fall silent."""
        name = self._named(who).name
        unheard = [node for k, node in enumerate(self.schedule.shape.nodes) if not mask >> k & 1]
        self._cut([(n, name) for n in unheard] + [(name, n) for n in unheard if both], seconds)
        for node in unheard if breaks and not self.healing else ():
            self.net.reset(node, name)

    def split(self, who: str, mask: int, seconds: float) -> None:
        """A controller and some nodes on one side, the other nodes on the other; etcd and gateways reach both."""
        nodes = self.schedule.shape.nodes
        here = [self._named(who).name, *(n for k, n in enumerate(nodes) if mask >> k & 1)]
        there = [n for n in nodes if n not in here]
        self._cut([pair for a in here for b in there for pair in ((a, b), (b, a))], seconds)

    def deaf(self, name: str, seconds: float) -> None:
        """Nothing of what etcd says reaches a process; what it says arrives."""
        name = self._named(name).name
        self._cut([(member.process.name, name) for member in self.etcd.members], seconds)

    def mute(self, name: str, seconds: float) -> None:
        """Nothing that nodes say reaches a gateway."""
        self._cut([(node, name) for node in self.schedule.shape.nodes], seconds)

    def hush(self, seconds: float) -> None:
        """Nothing passes between nodes."""
        nodes = self.schedule.shape.nodes
        self._cut([(a, b) for a in nodes for b in nodes if a != b], seconds)

    def flap(self, a: str, b: str, times: int, seconds: float) -> None:
        for turn in range(times):
            self.world.post(2 * turn * seconds, self.fate, self._cut, [(a, b), (b, a)], seconds)

    def _cut(self, pairs: list[tuple[str, str]], seconds: float) -> None:
        if self.healing:
            return
        self.cuts.append(pairs)
        self.net.cut(pairs)
        self.world.post(seconds, self.fate, self._mend, pairs)

    def _mend(self, pairs: list[tuple[str, str]]) -> None:
        if any(each is pairs for each in self.cuts):
            self.cuts = [each for each in self.cuts if each is not pairs]
            self.net.heal(pairs)
            self.net.broken_at_heal()

    def reset(self, a: str, b: str) -> None:
        self.net.reset(a, b)

    def slow(self, delay_s: float, seconds: float) -> None:
        self.net.delay_s = delay_s
        self.world.post(seconds, self.fate, setattr, self.net, "delay_s", 0.0)

    def tamper(self, a: str, b: str, how: str) -> None:
        self.net.tamper.setdefault((a, b), []).append(how)

    def corrupt(self, name: str, pick: int, bit: int) -> None:
        """A bit of a copy turns, in the memory of its holder: of this node, or of the next that holds any."""
        nodes = sorted(self.nodes(), key=lambda pair: (pair[0] < name, pair[0]))
        for _, node in nodes:
            store = parts.store_of(node)
            # What is in service is computed with, and no longer looked at: memory that fails there is not survived.
            blocks = sorted(block for block in store.copies.holders() if store.pool.at_rest(block))
            if blocks:
                parts.corrupt(node, blocks[pick % len(blocks)], bit)
                self.outcome.faults["bit of a copy"] += 1
                return

    def flip(self, name: str, pick: int, bit: int) -> None:
        """A bit of a parity turns, on this node or the next that has any."""
        for _, node in sorted(self.nodes(), key=lambda pair: (pair[0] < name, pair[0])):
            if parts.flip(node, pick, bit):
                self.outcome.faults["bit of a parity"] += 1
                return

    def wall_jump(self, seconds: float) -> None:
        self.world.wall_jump_s += seconds

    def clash(self, name: str, seconds: float) -> None:
        """A second process of a name, on another host, for so long."""
        if self.healing:
            return
        stranger = self._begin(name)
        self.clashed.add(name)
        self.strangers.append(stranger)
        self.world.post(seconds, self.fate, self._leave_name, stranger)

    def _leave_name(self, stranger: Process) -> None:
        if stranger.alive:
            self._end(stranger)

    def upgrade(self, name: str, code: int) -> None:
        """A process is replaced by one of another version of the code, newer or older."""
        name = self._named(name).name
        self.codes[name] = code
        self.newest = max(self.newest, code)
        if self.processes[name].alive:
            self._end(self.processes[name])
        self.start(name)

    # ------------------------------------------------------------------ steps: etcd

    def etcd_refuses(self, how: str, seconds: float) -> None:
        self.etcd.refusing = how
        self.world.post(seconds, self.fate, setattr, self.etcd, "refusing", "")

    def etcd_kill(self, index: int, seconds: float) -> None:
        member = self.etcd.members[index]
        self.etcd.kill(member)
        self.world.post(seconds, self.fate, self.etcd.start, member)

    def etcd_down(self, count: int, seconds: float) -> None:
        for index in range(count):
            self.etcd_kill(index, seconds)

    def etcd_pause(self, index: int, seconds: float) -> None:
        self.pause(f"e{index}", seconds)

    def fate_of_write(self, how: str) -> None:
        self.etcd.fates.append(how)

    def expire(self, name: str) -> None:
        """Its leases are taken for expired, all at once; of a leader also that of its leadership."""
        owner = self._named(name)
        for lease in [lease for lease in self.etcd.store.leases.values() if lease.owner is owner]:
            self.etcd.expire(lease.id)

    def restore(self, back: int) -> None:
        """etcd's topology is the one of so many writes ago, or the first one."""
        self.checks.put_back(back)

    def compact(self) -> None:
        store = self.etcd.store
        if store.revision > store.compacted:
            store.compact(store.revision)

    # ------------------------------------------------------------------ steps: operations

    def operate(self, kind: str, node: str, substitute: str) -> None:
        service = self._service()
        if service is not None:
            self.operations += 1
            request = OperationRequest(f"op-{self.operations}", kind, node, substitute or None)
            self._ask(service[0], service[1].submit(request, ADMIN_CALLER))

    def scale(self, instances: int) -> None:
        service = self._service()
        if service is not None:
            self.operations += 1
            request = OperationRequest(f"op-{self.operations}", "scale", instances=instances)
            self._ask(service[0], service[1].submit(request, ADMIN_CALLER))

    def cancel_operation(self) -> None:
        service = self._service()
        if service is not None and self.operations:
            self._ask(service[0], service[1].cancel(f"op-{self.operations}", ADMIN_CALLER))
