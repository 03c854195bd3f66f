"""The invariants of the design (section 6) that show from outside of the processes, looked at after every turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.keys import Keys, decode
from controlplane.contract.records import ControllerRecord
from controlplane.contract.reports import LAG_UNKNOWN, TargetReport
from controlplane.contract.topology import Mode, Pipeline, Topology
from controlplane.core import invariants
from controlplane.core.policy import Situation
from controlplane.etcd.election import leader_of
from controlplane.etcd.proto import rpc_pb2
from controlplane.etcd.register import holder_of
from controlplane.etcd.wire import key_value
from dataplane.core.encoder import Add, Close, Encoder
from dataplane.core.messages import KvAckMeta, KvMeta, ShardAckMeta
from dataplane.core.parity import MINE, WHOLE, ShardSource
from dataplane.core.prefix import unpack_names
from dataplane.core.stage import Stage
from dataplane.node import Node
from dataplane.replica import Replicator
from tests.sim import parts
from tests.sim.border import LATER
from tests.sim.etcd import SimEtcd
from tests.sim.world import Process, World, replaced

# Those that need nothing but the two topologies; the others are checked by plan() itself at each of its steps.
STATELESS = (
    invariants.counter_grows_by_one,
    invariants.pipelines_stay,
    invariants.epoch_follows_ranks,
    invariants.no_node_twice_in_a_pipeline,
    invariants.copies_are_elsewhere,
)


class Checks:
    def __init__(self, world: World, etcd: SimEtcd, keys: Keys, group: str) -> None:
        self.topology: Topology | None = None  # as etcd has it
        self.written = 0
        self._world = world
        self._etcd = etcd
        self._keys = keys
        self._topology_key = keys.topology(group).encode()
        self._tell = etcd.store.changed
        self._revision = 0
        self.calm = False  # nobody dies: nobody may lose a duty either
        self._fences: dict[Process, dict[PipelineId, Any]] = {}
        # What the holder of a copy has said last, by source process, pipeline, holder and request.
        self._holders: dict[str, str] = {}  # name -> the process that has it
        self._raw: dict[str, Any] = {}  # topology and operations as they are written
        self._past: list[bytes] = []  # topologies as they were written
        self._putting_back = False
        self._was_put_back = False  # the next write begins new epochs for whoever serves
        self._said: dict[tuple[Process, PipelineId, Member], dict[int, int]] = {}
        # Shards that an encoder has added to the parity of a name, and names that had those of all stages at some time.
        self._added: dict[tuple[str, PipelineId, bytes], set[int]] = {}
        self._coded: set[tuple[str, PipelineId, bytes]] = set()
        self._heard: set[Process] = set()  # news of copies since the last look
        # Copies of which the node that serves has ever said that hardly anything is missing: pipeline, epoch, holder.
        self._near: set[tuple[PipelineId, int, Member]] = set()
        etcd.store.changed = self._committed
        world.after = self._after

    # What etcd accepts.

    def put_back(self, back: int) -> None:
        """The topology of so many writes ago is in etcd again, as after a snapshot was restored."""
        old = self._past[max(0, len(self._past) - 1 - back) :][:1]
        if not old or old[0] == self._past[-1]:
            return
        self._putting_back = self._was_put_back = True
        try:
            self._etcd.store.put(rpc_pb2.PutRequest(key=self._topology_key, value=old[0]))
        finally:
            self._putting_back = False

    def _committed(self) -> None:
        if self._putting_back:
            kv = self._etcd.store.kvs[self._topology_key]
            self._revision = kv.mod_revision
            self._raw[self._topology_key.decode()] = msgspec.json.decode(kv.value)
            self._world.note(f"topology {decode(kv.value, Topology, 'topology').counter} is put back")
            self._tell()
            return
        for kv in self._etcd.store.latest:
            self._names(kv.key.decode(), kv.value)
            self._kept(kv.key.decode(), kv.value)
        kv = self._etcd.store.kvs.get(self._topology_key)
        if kv is not None and kv.mod_revision > self._revision:
            self._revision = kv.mod_revision
            self._past.append(kv.value)
            self._new_topology(decode(kv.value, Topology, "topology"))
        self._tell()

    def _names(self, key: str, value: bytes) -> None:
        """A name passes to another process only when the first one has died, or its lease has ended."""
        if not key.startswith((self._keys.nodes, self._keys.controllers, self._keys.gateways)):
            return
        now = holder_of(value) if value else None
        before = self._holders.pop(key, None)
        if now is not None:
            self._holders[key] = now.process
        lives = any(repr(p) == before and p.alive for p in self._world.processes)
        if now is not None and now.process != before and lives:
            self._world.fail(f"{key} was taken from {before}, which lives, by {now.process}")

    def _kept(self, key: str, value: bytes) -> None:
        """Older code overwrites nothing of newer code, and loses no field of it."""
        if key.encode() != self._topology_key and not key.startswith(self._keys.operations):
            return
        before, after = self._raw.pop(key, None), msgspec.json.decode(value) if value else None
        if after is None:
            return
        self._raw[key] = after
        if before is None:
            return
        if after["schema"] < before["schema"]:
            self._world.fail(f"{key} went from schema {before['schema']} to {after['schema']}")
        if lost := lost_fields(before, after):
            self._world.fail(f"{key} lost what newer code had written: {lost}")

    def _new_topology(self, after: Topology) -> None:
        before, self.topology = self.topology, after
        self.written += 1
        self._one_leader(after)
        self._world.note(f"topology {after.counter} by {self._etcd.writer}: {picture(after)}")
        if before is None:
            return
        situation = Situation(before, None, None, 0.0, frozenset())  # type: ignore[arg-type]
        known, self._was_put_back = not self._was_put_back, False
        if after.counter <= before.counter:
            self._world.fail(f"topology {after.counter} after {before.counter}")
        for check in STATELESS if known else ():
            for problem in check(situation, after):
                self._world.fail(f"topology {after.counter}: {check.__name__}: {problem}")
        for old in before.pipelines:
            new = after.pipeline(old.id)
            if self.calm and new is not None and new.epoch != old.epoch:
                self._world.fail(
                    f"topology {after.counter}: nobody died, and {old.id} changed: {picture(after)}"
                )
            if new is not None and old.epoch != new.epoch == new.moved:
                self._carried(old, after)
            if new is not None and new.epoch < old.epoch:
                self._world.fail(
                    f"topology {after.counter}: epoch of {old.id} from {old.epoch} to {new.epoch}"
                )

    def _carried(self, old: Pipeline, after: Topology) -> None:
        """Nobody who lives gives way to a node that has to compute everything again."""
        to = old.move.to if old.move is not None else None
        if after.mode is not Mode.NONE and (to is None or (old.id, old.epoch, to) not in self._near):
            self._world.fail(f"topology {after.counter}: {old.id} went to {to}, whose copy was never near")

    def _one_leader(self, after: Topology) -> None:
        """Who writes is who leads by etcd's own order of things, in this very revision."""
        prefix = self._keys.leader.encode()
        store = self._etcd.store
        items = {kv.key.decode(): key_value(kv) for k, kv in store.kvs.items() if k.startswith(prefix)}
        leader, writer = leader_of(items), self._etcd.writer
        name = decode(leader.identity, ControllerRecord, leader.key).id if leader is not None else "nobody"
        lease = store.leases.get(items[leader.key].lease) if leader is not None else None
        if writer is None or lease is None or lease.owner is not writer:
            self._world.fail(f"topology {after.counter} was written by {writer}, but {name} leads")

    # What nodes do.

    def _after(self, process: Process) -> None:
        node = process.part
        if type(node) is not Node or not process.alive:
            return
        known = self._fences.get(process)
        if known is None:
            known = self._fences[process] = {}
        for pipeline, stage in parts.stages_of(node).items():
            before = known.get(pipeline)
            if before is not stage.fence:  # fences are immutable
                if before is not None and stage.fence < before:
                    self._world.fail(f"{process} went back from {before} to {stage.fence} in {pipeline}")
                known[pipeline] = stage.fence
        if process in self._heard:
            self._heard.discard(process)
            self._watermarks(process, node)

    def _watermarks(self, process: Process, node: Node) -> None:
        for pipeline, source in parts.sources_of(node):
            said = self._said.get((process, pipeline, source.target), {})
            for rid, tokens in parts.acknowledged_of(source).items():
                if tokens > said.get(rid, 0):
                    self._world.fail(
                        f"{process} counts {tokens} tokens of {rid} on {source.target} as safe, "
                        f"which has acknowledged {said.get(rid, 0)}"
                    )

    @contextlib.contextmanager
    def probes(self) -> Iterator[None]:
        """Look into what nodes do at the moment they do it."""
        commit, store_copies, acknowledged = Stage.commit, Replicator.store_copies, Replicator.acknowledged
        pump, targets = Replicator.pump, Replicator.targets
        arrived, drop, heard = Encoder.arrived, Encoder._drop, ShardSource.heard

        def process() -> Process:
            assert self._world.current is not None
            return self._world.current

        def fenced(what: str, pipeline: PipelineId, epoch: int) -> None:
            node = process().part
            if isinstance(node, Node) and epoch < parts.epoch_known(node, pipeline):
                known = parts.epoch_known(node, pipeline)
                self._world.fail(f"{process()} {what} of epoch {epoch} of {pipeline}, knowing {known}")

        def commit_probe(stage: Stage, step: Any, tokens: Any) -> list[int]:
            fenced(f"ran step {step.meta.step}", stage.pipeline, step.meta.fence.epoch)
            if step.meta.fence < stage.fence:
                self._world.fail(f"{process()} ran a step of {step.meta.fence} in {stage.fence}")
            return commit(stage, step, tokens)

        async def store_probe(me: Replicator, peer: Member, meta: KvMeta, payload: memoryview) -> None:
            fenced("stored a copy", meta.pipeline, meta.fence.epoch)
            await store_copies(me, peer, meta, payload)

        def acknowledged_probe(me: Replicator, peer: Member, meta: KvAckMeta, now: float) -> None:
            at = process(), meta.pipeline, peer
            self._heard.add(at[0])
            said = {} if meta.whole else self._said.get(at, {})
            self._said[at] = said | dict(meta.held)
            acknowledged(me, peer, meta, now)

        async def pump_probe(me: Replicator, now: float, others_wait: Callable[[], bool]) -> None:
            self._heard.add(process())
            await pump(me, now, others_wait)

        def targets_probe(me: Replicator, pipeline: PipelineId) -> tuple[TargetReport, ...]:
            said = targets(me, pipeline)
            near = [
                t.target for t in said if t.lag_tokens < LAG_UNKNOWN and t.behind_s <= parts.LIMITS.behind_s
            ]
            self._near.update((pipeline, me._protected[pipeline].fence.epoch, target) for target in near)
            return said

        def arrived_probe(me: Encoder, key: Any, stage: int, shape: Any, *others: Any) -> Any:
            effects = arrived(me, key, stage, shape, *others)
            at = repr(process()), *key
            if any(isinstance(effect, Add) for effect in effects):
                added = self._added.setdefault(at, set())
                added.add(stage)
                if len(added) == shape.shards:
                    self._coded.add(at)
            return effects

        def drop_probe(me: Encoder, key: Any, full: bool = False) -> Any:
            effects = drop(me, key, full)
            if any(isinstance(effect, Close) for effect in effects):
                self._added.pop((repr(process()), *key), None)
            return effects

        def heard_probe(me: ShardSource, encoder: Member, meta: ShardAckMeta, now: float) -> None:
            pairs = zip(unpack_names(meta.names), meta.flags, strict=True)
            whole = [name for name, flags in pairs if flags == MINE | WHOLE]
            for name in (*unpack_names(meta.complete), *whole):
                at = str(encoder), meta.pipeline, name
                if at not in self._coded:
                    self._world.fail(
                        f"{process()} counts a block of {meta.pipeline} as protected by {encoder}, which has "
                        f"{len(self._added.get(at, ()))} shards of it"
                    )
            heard(me, encoder, meta, now)

        probes = (
            (Encoder, "arrived", arrived_probe),
            (Encoder, "_drop", drop_probe),
            (ShardSource, "heard", heard_probe),
            (Stage, "commit", commit_probe),
            (Replicator, "store_copies", store_probe),
            (Replicator, "acknowledged", acknowledged_probe),
            (Replicator, "pump", pump_probe),
            (Replicator, "targets", targets_probe),
        )
        with replaced(probes):
            yield


def lost_fields(before: Any, after: Any, where: str = "") -> str:
    """Where a record that persists has lost the field that older code does not know; "": nowhere."""
    if isinstance(before, list) and isinstance(after, list):
        if where.endswith(".stages"):
            pairs = list(zip(before, after, strict=False))
        else:
            named = {str(item["id"]): item for item in after if isinstance(item, dict) and "id" in item}
            pairs = [
                (item, named[item["id"]])
                for item in before
                if isinstance(item, dict) and item.get("id") in named
            ]
        return next((lost for old, new in pairs if (lost := lost_fields(old, new, where))), "")
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return ""
    if where.endswith((".move", ".to")):
        return ""  # it may be another one
    if LATER in before and LATER not in after:
        return where or "the value itself"
    deeper = (lost_fields(before[key], after[key], f"{where}.{key}") for key in before if key in after)
    return next((lost for lost in deeper if lost), "")


def picture(topology: Topology) -> str:
    """A topology on one line, for people who look for a defect."""
    found = []
    for p in topology.pipelines:
        stages = " ".join(
            f"{','.join(map(str, s.ranks)) or '-'}>{','.join(map(str, s.replicas)) or '-'}" for s in p.stages
        )
        move = f" {p.move.phase.value} {p.move.stage} to {p.move.to}" if p.move is not None else ""
        found.append(f"{p.id}#{p.epoch}[{stages}{move}]")
    tail = f" cordoned {','.join(topology.cordoned)}" if topology.cordoned else ""
    return " ".join(found) + tail
