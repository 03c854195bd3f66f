"""One node process: puts its parts together, and carries messages between them.

    gateway =gRPC=> Frontdoor -> Schedulers -> Worker -> (UCX) -> the next stage's Worker -> ... -> Schedulers
    etcd -> World -> Worker and Schedulers        Reporter =gRPC=> controllers

Weights, links and duties are separate: a node loads its weights once, keeps links to those it may have to work with
(core/peers.py), and serves whatever stage of whatever pipeline the topology gives it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlplane import process
from controlplane.contract import auth, keys
from controlplane.contract.address import ports_of
from controlplane.contract.config import ClusterConfig
from controlplane.contract.identity import Identity, ProcessRole
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys
from controlplane.contract.records import NodeRecord
from controlplane.contract.repair import Computing
from controlplane.contract.reports import NodeReport, PipelineReport
from controlplane.contract.requests import SAMPLING_VERSION
from controlplane.contract.topology import HOLDER_MODES, Pipeline, Topology
from controlplane.contract.version import code_version, settings_digest
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.register import Registration
from controlplane.grammar import library_version
from controlplane.keyspace.connect import etcd_client
from dataplane.accelerators import CPU, Place
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.holders import candidates_of, leaders_at, sources_of
from dataplane.core.messages import (
    CopiedMeta,
    HeldMeta,
    LoadMeta,
    LostMeta,
    Meta,
    Ping,
    ReadyMeta,
    ResultMeta,
    StepFailedMeta,
)
from dataplane.core.pace import Timeliness
from dataplane.core.parity import partners_of
from dataplane.core.peers import Peers, engages, pipelines_of
from dataplane.core.speculation import Proposer
from dataplane.devices import emulate_network
from dataplane.frontdoor import Frontdoor
from dataplane.inbox import LinkChanged, Message
from dataplane.loading import table_rows
from dataplane.moment import MOMENT
from dataplane.oracle import HASH_BYTES, OracleExecutor
from dataplane.replica import ReplicaStats
from dataplane.reporter import Reporter
from dataplane.schedulers import Schedulers
from dataplane.tracing import Tracer
from dataplane.transport import frames
from dataplane.transport.base import TransportConfig, TransportStats
from dataplane.transport.choose import open_transport
from dataplane.transport.lane import Lane
from dataplane.weights_service import WeightsService
from dataplane.worker import Worker
from dataplane.world import World

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor
    from dataplane.grammars import Grammars
    from dataplane.transport.sealing import LinkIdentity

log = logging.getLogger(__name__)

TICK_S = 0.05
LINKS_LOOKED_AT_S = 1.0  # how often unused links are looked for
GOODBYE_LIMIT_S = 0.3  # for the report that says that this node leaves
LEAVE_LIMIT_S = 2.0  # for everything that it does before it ends
# Counters that reports carry. (`asdict` copies each value deeply, for every report.)
OF_COPIES = tuple(field.name for field in fields(ReplicaStats))
OF_LINKS = tuple(field.name for field in fields(TransportStats))


class Node:
    def __init__(
        self,
        config: ClusterConfig,
        me: Member,
        stage: int,
        executor: StageExecutor | OracleExecutor,
        settings: str = "",
        supersedes: Collection[str] = (),
        place: Place = CPU,
        relay: str = "",
        grammars: Grammars | None = None,
        proposer: Proposer | None = None,
        checkpoint: str = "",
    ) -> None:
        """`settings`: digest of the settings as they were read, where `config` is not (its model may be elsewhere).
        `relay`: address of the host's, if it may have one. `grammars`: of a last stage. `proposer`: see
        loading.py. `checkpoint`: that the weights are of, "" if that is not known."""
        self._checkpoint = checkpoint
        self._place = place
        self._settings = settings or settings_digest(config)
        self._supersedes = supersedes
        self._config = config
        self._me = me
        self._stage = stage
        self._executor = executor
        secret = auth.load_secret(config.secret_file)
        identity = self._identity = Identity.of(config, ProcessRole.NODE, me.node)
        engine = config.engine
        context = engine.context_len(executor.config.max_positions, executor.kv.num_blocks)
        self._context_len = context
        store = KvStore(
            executor.kv.num_blocks,
            engine.block_size,
            table_rows(engine),
            -(-context // engine.block_size),
        )
        self._store = store
        self._worker = Worker(me, executor, store, self._send, self._send_later, grammars, config.parity)
        self._tracer = Tracer.of(config, me, stage)
        if self._tracer is not None:
            self._worker.on_traced = self._tracer.on_step
        token = auth.derive(secret, "grpc")
        self._frontdoor = Frontdoor(
            token,
            lambda session, message: self._schedulers.on_gateway(session, message),
            lambda session: self._schedulers.on_session_lost(session),
            WeightsService(
                token,
                Path(config.model),
                stage,
                config.stages,
                executor.weights_digest,
                identity,
                checkpoint,
            ).handler,
            identity=identity,
        )
        limits = Limits.from_config(engine, context, config.timing.orphan_grace_s, executor.config.vocab_size)
        self._reporter = Reporter(
            token,
            config.timing.heartbeat_s,
            self._report,
            lambda: self._moving,
            relay,
            self._counters,
            identity,
        )
        self._schedulers = Schedulers(
            me,
            limits,
            engine.microbatches,
            self._frontdoor,
            self._worker.put,
            self._send,
            self._reporter.kick,
            proposer,
            self._tracer,
        )
        self._worker.hosts = self._schedulers.hosts
        self._transport = open_transport(
            config.transport,
            TransportConfig(
                member=me,
                cluster=config.cluster,
                secret=secret,
                host=config.host,
                advertise=config.advertise,
                ports=ports_of(config.link_ports, me.node),
                identity=_link_identity(identity),
            ),
            on_message=self._on_message,
            on_link_up=self._on_link_up,
            on_link_down=self._on_link_down,
            emulate=emulate_network(config, me.node, HASH_BYTES),
        )
        self._lane = Lane(self._transport, self._send)
        self._world = World(Keys.of(config), config.group)
        self._peers = Peers(me, stage, config.timing.dead_after_s)
        self._topology: Topology | None = None  # the one that is acted on
        self._ours: list[Pipeline] = []  # its pipelines that name us
        self._partners: set[str] = set()  # whom shards go to or come from
        self._duties: list[Pipeline] | None = None  # of those, where we do something
        self._links_at = 0.0  # when unused links are looked for next
        self._bad_frames = 0
        self._timeliness = Timeliness()
        self._leaving = False
        # A pipeline that we serve is being moved: its leader waits for each of our reports.
        self._moving = False
        self._stop = asyncio.Event()

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Serve until stopped or retired. Raises what a background task of ours raised."""
        link_address = await self._transport.start()
        config, ports = self._config, ports_of(self._config.node_ports, self._me.node)
        rpc_address = await self._frontdoor.start(config.host, config.advertise, ports)
        client = etcd_client(self._config, self._identity)
        record = self._record(link_address, rpc_address)
        name, lease_s = self._world.names.node(self._me.node), self._config.timing.node_lease_s
        registration = Registration(client, name, keys.encode(record), lease_s, supersedes=self._supersedes)
        background: list[Coroutine[Any, Any, None]] = [
            registration.run(),
            self._watch(client, registration),
            self._worker.run(),
            self._tick(),
        ]
        tasks = [asyncio.create_task(c) for c in background]
        stop = asyncio.create_task(self._stop.wait())
        log.info("node %s serves links on %s, gateways on %s", self._me, link_address, rpc_address)
        try:
            done, _ = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._leaving = True
            try:
                async with asyncio.timeout(LEAVE_LIMIT_S):
                    await self._leave(registration, client, [stop, *tasks])
            except TimeoutError:
                log.warning("not everything was closed in time; peers see it when the process ends")

    async def _leave(
        self, registration: Registration, client: EtcdClient, tasks: Sequence[asyncio.Task[Any]]
    ) -> None:
        await self._reporter.flush(GOODBYE_LIMIT_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await registration.withdraw(timeout_s=0.5)
        await self._reporter.close()
        await self._frontdoor.close()
        self._lane.close()
        await self._transport.close()
        await client.close()
        self._worker.close()
        if self._tracer is not None:
            self._tracer.close()

    def stop(self) -> None:
        """Leave on purpose: reported, deregistered, then gone."""
        self._stop.set()

    def _record(self, link_address: str, rpc_address: str) -> NodeRecord:
        config = self._config
        return NodeRecord(
            member=self._me,
            group=config.group,
            stage=self._stage,
            num_stages=config.stages,
            link_address=link_address,
            rpc_address=rpc_address,
            weights_digest=self._executor.weights_digest,
            pool_blocks=self._executor.kv.num_blocks,
            block_size=config.engine.block_size,
            pid=os.getpid(),
            fault_domain=config.fault_domain(os.uname().nodename, self._me.node),
            started_unix_s=time.time(),
            host_parallel=self._place.devices
            or max(1, len(os.sched_getaffinity(0)) // config.engine.threads),
            context_len=self._context_len,
            numerics=self._executor.numerics,
            grammars=library_version(),
            sampling=SAMPLING_VERSION,
            version=code_version(),
            settings=self._settings,
            process=process.identity(),
            checkpoint=self._checkpoint,
        )

    # ------------------------------------------------------------------ etcd

    async def _watch(self, client: EtcdClient, registration: Registration) -> None:
        # A process whose name is somebody else's must not speak in it: not to controllers, not on links.
        await registration.held.wait()
        async for batch in client.watch_prefix(self._world.names.root):
            folders = {change.folder for change in self._world.apply(batch)}
            registration.saw(self._world.view.item(registration.key), batch.revision)
            if "controllers" in folders:
                self._reporter.set_controllers(self._world.controllers)
            self._schedulers.on_records(self._world.nodes)
            before, topology = self._topology, self._world.topology
            if topology is not None and topology is not before:
                if self._world.view.retired(self._me):
                    log.info("retired by topology %d", topology.counter)
                    self.stop()
                    return
                self._ours = pipelines_of(topology, self._me)
                self._partners = partners_of(topology, self._me) | self._copy_partners(topology)
            if "nodes" in folders or topology is not before:
                self._open_links()
            if topology is not None and topology is not before:
                self._take_up(topology)

    def _copy_partners(self, topology: Topology) -> set[str]:
        """Whom copies of single requests go to or come from, and the loads that say where they had better go."""
        found: set[str] = set()
        hosts = self._schedulers.hosts
        for pipeline in self._ours if topology.mode in HOLDER_MODES else ():
            if (stages := pipeline.stages_of(self._me)) and pipeline.up:
                others = (*candidates_of(topology, pipeline, hosts), *sources_of(topology, pipeline, hosts))
                found |= {member.node for member in leaders_at(others, stages[0]).values()}
        return found - {self._me.node}

    def _take_up(self, topology: Topology) -> None:
        self._topology = topology
        # The worker first: what the schedulers ask of it then finds the new duties in place.
        self._worker.put(topology)
        self._schedulers.on_topology(topology, self._world.nodes)
        duties = [pipeline for pipeline in self._ours if engages(pipeline, self._me)]
        self._moving = any(pipeline.move is not None for pipeline in duties)
        if self._duties is None or duties != self._duties:
            self._reporter.kick()
        self._duties = duties

    def _open_links(self) -> None:
        now = time.monotonic()
        for record in self._peers.follow(self._ours, self._world.nodes, now, self._partners):
            self._transport.connect(record.member, record.link_address)
        self._close_links(now)

    def _close_links(self, now: float) -> None:
        self._links_at = now + LINKS_LOOKED_AT_S
        for node in self._peers.unused(self._world.nodes, self._transport.last_heard, now):
            self._transport.disconnect(node)

    # ------------------------------------------------------------------ links

    def _send(self, peer: Member, meta: Meta, payload: frames.Buffer) -> bool:
        if peer == self._me:
            self._dispatch(peer, meta, payload)
            return True
        self._peers.sent(peer, time.monotonic())
        in_memory = self._transport.carried_by(peer) == "local"
        return self._transport.send(peer, frames.encode(meta, payload, in_memory=in_memory))

    def _send_later(self, peer: Member, meta: Meta, payload: frames.Buffer) -> bool:
        return self._lane.send(peer, meta, payload)

    def _on_message(self, peer: Member, data: memoryview) -> None:
        try:
            frame = frames.decode(data)
        except frames.BadFrame as error:
            self._bad_frames += 1
            if isinstance(error, frames.ForeignFrame):
                self._transport.refuse(peer, str(error))
            else:
                log.warning("from %s: %s", peer, error)
            return
        if self._peers.is_down(peer) and self._transport.connected(peer):
            self._peers.opened(peer)  # only its link to us had broken, and it has opened another
        self._dispatch(peer, frame.meta, frame.payload)

    def _dispatch(self, peer: Member, meta: Meta, payload: frames.Buffer) -> None:
        match meta:
            case Ping():
                pass
            case ResultMeta() | StepFailedMeta() | HeldMeta() | ReadyMeta() | LostMeta() | CopiedMeta():
                self._schedulers.on_message(meta)
            case LoadMeta():
                self._schedulers.on_load(meta)
            case _:
                self._worker.put(Message(peer, meta, payload, came=MOMENT.now()))

    def _on_link_up(self, peer: Member) -> None:
        self._peers.opened(peer)
        self._schedulers.on_link_up(peer)
        self._worker.put(LinkChanged(peer.node))

    def _on_link_down(self, peer: Member, reason: str) -> None:
        self._peers.broke(peer, reason)
        self._worker.put(LinkChanged(peer.node))
        self._reporter.kick()

    async def _tick(self) -> None:
        while True:
            began, computed_s = time.monotonic(), time.thread_time()
            await asyncio.sleep(TICK_S)
            self._timeliness.rang(TICK_S, time.monotonic() - began, time.thread_time() - computed_s)
            self._worker.compute.look(time.monotonic())
            self._schedulers.tick()
            self._worker.wake()
            now = time.monotonic()
            for peer in self._peers.to_ping(now):
                self._send(peer, Ping(), b"")
            if now >= self._links_at:
                self._close_links(now)

    # ------------------------------------------------------------------ reports

    def _report(self, seq: int, recoveries_sent: int) -> tuple[NodeReport, int]:
        now = time.monotonic()
        total = self._schedulers.recoveries_total
        fresh = total - recoveries_sent
        store, pace, busy = self._store, self._worker.compute.pace, self._worker.compute.busy
        report = NodeReport(
            member=self._me,
            seq=seq,
            unix_s=time.time(),
            progress=self._worker.stats.steps,
            pipelines=tuple(self._pipeline_reports(now)),
            links=tuple(self._peers.report(self._transport.last_heard, now)),
            recoveries=tuple(self._schedulers.recoveries[-fresh:]) if fresh > 0 else (),
            blocks_used=store.blocks_used,
            blocks_replica=store.blocks_replica,
            blocks_total=store.num_blocks,
            busy_s=now - busy[0] if busy is not None else 0.0,
            usual_s=pace.usual_s(busy[1]) if busy is not None else 0.0,
            still_s=self._worker.compute.still_s,
            poisoned=self._worker.stats.poisoned,
            times=pace.report(),
            timed_s=self._timeliness.timed_s,
            overdue_s=self._timeliness.overdue_s,
            topology_counter=self._worker.topology.counter if self._worker.topology else 0,
            leaving=self._leaving,
            troubles=(
                *self._frontdoor.troubles(),
                *self._identity.troubles(),
                *self._executor.troubles(),
            ),
            block_bytes=self._worker.block_bytes,
            restoring=self._worker.parity.restorer.speed.restoring,
        )
        return report, total

    def _pipeline_reports(self, now: float) -> list[PipelineReport]:
        reports = []
        for pipeline_id, stage in self._worker.stages.items():
            scheduler = self._schedulers.by_pipeline.get(pipeline_id)
            stalled_s, unanswered = scheduler.held_up(now) if scheduler else (0.0, -1)
            tokens, tail_tokens = scheduler.tokens if scheduler else (0, 0)
            computing = scheduler.batcher.computing if scheduler else Computing()
            reports.append(
                PipelineReport(
                    pipeline=pipeline_id,
                    epoch=stage.fence.epoch,
                    stage=stage.index,
                    last_step=stage.last_step,
                    running=scheduler.running if scheduler else 0,
                    waiting=scheduler.waiting if scheduler else 0,
                    stalled_s=stalled_s,
                    unanswered=unanswered,
                    round_s=scheduler.steps.round_s if scheduler else 0.0,
                    targets=self._worker.replicator.targets(pipeline_id),
                    tokens=tokens,
                    tail_tokens=tail_tokens,
                    token_s=computing.token_s,
                    step_s=computing.step_s,
                    unheld_tokens=scheduler.unheld_tokens if scheduler else -1,
                    uncoded_tokens=self._worker.parity.uncoded_tokens(pipeline_id),
                    pace_s=computing.pace_s,
                    chunk_tokens=computing.chunk_tokens,
                )
            )
        return reports

    def _counters(self) -> dict[str, int]:
        stats = self._worker.stats
        counters = {f"scheduler_{k}": v for k, v in self._schedulers.counters().items()}
        copies, links = self._worker.replicator.stats, self._transport.stats
        counters |= {f"replica_{name}": getattr(copies, name) for name in OF_COPIES}
        counters |= {f"link_{name}": getattr(links, name) for name in OF_LINKS}
        counters |= {f"fenced_{kind}": count for kind, count in stats.fenced.items()}
        counters |= self._worker.parity.counters()
        counters["replicas_evicted"] = self._store.copies.evictions
        counters["checksum_failures"] = self._store.checksum_failures
        counters["bad_frames"] = self._bad_frames
        counters["reports_broken_off"] = self._reporter.broken_off
        counters["copy_check_wait_ms"] = int(stats.check_wait_s * 1000)
        counters["inbox_dropped"] = stats.dropped_full
        counters["steps_merged"] = stats.merged
        counters["ranks_lost"] = self._executor.ranks_lost
        counters["compute_ms"] = int(self._worker.compute.total_s * 1000)
        return counters


def _link_identity(identity: Identity) -> LinkIdentity | None:
    if not identity.secure:
        return None
    from dataplane.transport.sealing import LinkIdentity  # cryptography is only loaded where it is used

    return LinkIdentity(identity)
