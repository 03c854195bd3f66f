"""How the production objects of a process are put together, and the few of their attributes that checks look at.

This mirrors dataplane/main.py, controlplane/main.py and web/gateway/main.py without the parts that decide nothing
(HTTP, the database). With border.py it is all that has to follow when production code changes shape.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from controlplane import process as machine
from controlplane.contract import auth
from controlplane.contract.config import ClusterConfig, EngineConfig, ParityConfig, Speculation, TimingConfig
from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import ControllerRecord, GatewayRecord
from controlplane.contract.requests import Sampling
from controlplane.contract.topology import Mode
from controlplane.core.controller import Controller
from controlplane.core.policy import Limits
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.errors import NameTaken
from controlplane.etcd.register import Registration
from controlplane.shell.hearing import tell_hearing
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry
from controlplane.shell.rpc import ReportServer
from controlplane.shell.runtime import Runtime
from controlplane.shell.service import Parts, Service
from dataplane.core.blocks import KvStore
from dataplane.core.replication import ReplicaSource
from dataplane.core.rhythm import Rhythm
from dataplane.core.scheduler import Scheduler
from dataplane.core.stage import Stage
from dataplane.devices import DeviceProfile
from dataplane.model.config import ModelConfig
from dataplane.model.ropes import RopeConfig
from dataplane.node import Node
from dataplane.oracle import OracleExecutor
from dataplane.parity import Parity
from dataplane.relay import RelayServer
from kernels.coding.codes import make_code
from tests.sim.world import Process
from web.gateway.metrics import Metrics
from web.gateway.policy import policy_of
from web.gateway.resume.tickets import new_nonce, rid_of
from web.gateway.routing.cluster_watch import ClusterWatch
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.routing.events import SubmitAsked
from web.gateway.routing.policy import Policy

BLOCK = 4
VOCAB = 512
CONTEXT = 64
MODEL = "sim"

# A pass takes so long that steps of several pipelines wait for a borrowed node and are merged.
DEVICE = DeviceProfile(0.005, 0.0001, 0.0, 8, 8)
PATIENT_S = 0.03  # longer than most steps take to come
# Automation that hurries: a virtual second costs real milliseconds.
LIMITS = Limits(settle_s=0.5, copy_limit_s=4.0, bar_s=2.0)
TIMING = TimingConfig(
    heartbeat_s=0.25,
    node_lease_s=3,
    leader_lease_s=2,
    suspect_after_s=0.6,
    dead_after_s=1.2,
    form_grace_s=2.0,
    unavailable_grace_s=5.0,
    orphan_grace_s=2.0,
)


@functools.cache
def run_dir() -> str:
    """A folder with a cluster's secret, for as long as this process lives."""
    folder = tempfile.mkdtemp(prefix="kf-sim-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    secret = Path(folder) / "secret"
    secret.touch(mode=0o600)
    secret.write_text("5" * 64)  # the same in every run: proofs made with it are among what frames carry
    return folder


def make_config(
    etcd: tuple[str, ...],
    instances: int,
    stages: int,
    spares: int,
    pool_blocks: int,
    microbatches: int,
    speculation: Speculation = "off",
    code: str = "",
    parities: int = 0,
    mode: str = "",
) -> ClusterConfig:
    return ClusterConfig(
        run_dir=run_dir(),
        model=MODEL,
        etcd=etcd,
        instances=instances,
        stages=stages,
        spares=spares,
        engine=EngineConfig(
            block_size=BLOCK,
            pool_blocks=pool_blocks,
            max_batch_tokens=16,
            max_running=6,
            max_waiting=12,
            max_model_len=CONTEXT,
            microbatches=microbatches,
            speculation=speculation,
            max_draft_tokens=5,
        ),
        timing=TIMING,
        mode=Mode(mode) if mode else Mode.PARITY if code else Mode.REPLICATE,
        parity=ParityConfig(cast(Any, code), parities) if code else ParityConfig(),
    )


def make_executor(stage: int, stages: int, pool_blocks: int) -> OracleExecutor:
    model = ModelConfig(
        family="oracle",
        vocab_size=VOCAB,
        hidden_size=1,
        intermediate_size=1,
        num_layers=stages,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        max_positions=CONTEXT,
        rms_norm_eps=1e-6,
        rope=RopeConfig("default", 10_000.0),
        tie_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * stages,
        dtype="float32",
        eos_token_ids=(),
    )
    return OracleExecutor(model, stage, stages, num_blocks=pool_blocks, block_size=BLOCK, profile=DEVICE)


# ---------------------------------------------------------------------------------- a node


class Patient(Rhythm):
    """Runs are too short for a rhythm, so with more than one microbatch every step of a shared node waits."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    def patience_s(self, pipeline: PipelineId, now: float) -> float:
        return PATIENT_S if len(stages_of(self._node)) > 1 else 0.0


async def named(main: Coroutine[Any, Any, None], process: Process) -> None:
    """The main coroutine of a process; that another one has its name is a way to end."""
    try:
        await main
    except NameTaken as error:
        process.world.note(f"{process} ends: {error}")
        process.fenced = True


async def node_main(
    process: Process, config: ClusterConfig, stage: int, relay: str = "", parity_blocks: int = 0
) -> None:
    """`relay`: address of its host's, if it has one. `parity_blocks`: see Shape."""
    executor = make_executor(stage, config.stages, config.engine.pool_blocks)
    me = Member(process.name, process.incarnation)
    node = process.part = Node(config, me, stage, cast(Any, executor), relay=relay)
    if config.engine.microbatches > 1:
        node._worker._rhythm = Patient(node)
    if parity_blocks:
        node._worker.parity.encoding.encoder._room_bytes = parity_blocks * parity_bytes(config)
    await node.run()


def parity_bytes(config: ClusterConfig) -> int:
    """Of one name."""
    each = make_code(config.parity.code, config.stages, config.parity.parities).parity_bytes(8 * BLOCK)
    return each * config.parity.parities


def stages_of(node: Node) -> dict[PipelineId, Stage]:
    return node._worker.stages


def epoch_known(node: Node, pipeline: PipelineId) -> int:
    """The newest epoch of a pipeline that the node has acted on."""
    topology = node._worker.topology
    found = topology.pipeline(pipeline) if topology is not None else None
    return -1 if found is None else found.epoch


def store_of(node: Node) -> KvStore:
    return node._store


def corrupt(node: Node, block: int, bit: int) -> None:
    """Flip one bit of a block in memory."""
    node._executor.kv.view(block)[bit // 8] ^= 1 << bit % 8


def parity_of(node: Node) -> Parity:
    return node._worker.parity


def flip(node: Node, pick: int, bit: int) -> bool:
    """Turn one bit of a parity. False: there is none here."""
    parities = [part for parts in parity_of(node).encoding.bytes.parities.values() for part in parts]
    if parities:
        parities[pick % len(parities)][bit // 8] ^= 1 << bit % 8
    return bool(parities)


def schedulers_of(node: Node) -> dict[PipelineId, Scheduler]:
    return node._schedulers.by_pipeline


def cached_of(scheduler: Scheduler) -> set[bytes]:
    """Names of the blocks that no request has and that are kept."""
    return set(scheduler.batcher.account._cached)


def placed_of(scheduler: Scheduler) -> list[int]:
    """Requests that have holders of their own."""
    return [] if scheduler.holders is None else list(scheduler.holders._placed)


def sources_of(node: Node) -> Iterator[tuple[PipelineId, ReplicaSource]]:
    for pipeline, state in node._worker.replicator._protected.items():
        for source in state.sources.values():
            yield pipeline, source


def acknowledged_of(source: ReplicaSource) -> dict[int, int]:
    """What a source counts as held by its target, by request."""
    return {rid: progress.acked for rid, progress in source._progress.items()}


# ---------------------------------------------------------------------------------- a host's relay


async def relay_main(process: Process, config: ClusterConfig) -> None:
    server = process.part = RelayServer(config, auth.derive(auth.load_secret(config.secret_file), "grpc"))
    await server.run()


def reports_by_itself(node: Node) -> bool:
    """To some controller, whatever its host's relay does."""
    return bool(node._reporter._lines)


# ---------------------------------------------------------------------------------- a controller


class NoHistory:
    """Stands for the database, which no decision waits for."""

    def put(self, record: object) -> None:
        pass


@dataclass(slots=True)
class ControllerPart:
    controller: Controller
    runtime: Runtime
    service: Service


async def controller_main(process: Process, config: ClusterConfig) -> None:
    me = process.name
    secret = auth.load_secret(config.secret_file)
    keys = Keys.of(config)
    inbox = Inbox()
    client = EtcdClient(config.etcd)
    history = cast(Any, NoHistory())
    reports = ReportServer(auth.derive(secret, "grpc"), inbox, config.timing)
    address = await reports.start(config.host)
    record = ControllerRecord(me, address, "", 1, process.incarnation, process=machine.identity())
    presence = Registration(client, keys.controller(me), encode(record), config.timing.node_lease_s)
    lease_s = config.timing.leader_lease_s
    election = Election(client, keys.leader, encode(record), ttl_s=lease_s, guards=presence.guard)
    controller = Controller(config, me, LIMITS)
    registry = Registry(client, keys, config.group, inbox, Member(me, process.incarnation), presence)
    performer = Performer(client, keys, config.group, inbox, history, registry.view)
    runtime = Runtime(controller, inbox, registry, performer, election)
    service = Service(
        config, me, Parts(controller, registry, client, history, cast(Any, None), cast(Any, None))
    )
    process.part = ControllerPart(controller, runtime, service)
    hearing = tell_hearing(client, keys, me, controller, presence, registry.view)
    jobs = runtime.run(), performer.run(), registry.run(), runtime.campaign(), presence.run(), hearing
    await asyncio.gather(*jobs)


# ---------------------------------------------------------------------------------- a gateway


@functools.cache
def metrics() -> Metrics:
    """Shared by all gateways of all runs: nothing reads them."""
    return Metrics()


@dataclass(slots=True)
class GatewayPart:
    dispatcher: Dispatcher

    def submit(self, sink: Any, prompt: tuple[int, ...], sampling: Sampling) -> int:
        rid = rid_of(new_nonce(), 0)
        self.dispatcher.submit(sink, 0, SubmitAsked(rid, prompt, sampling, 0))
        return rid

    def cancel(self, rid: int, sink: Any) -> None:
        self.dispatcher.cancel(rid, sink)

    @property
    def live(self) -> int:
        return self.dispatcher.router.live

    @property
    def reachable(self) -> int:
        return self.dispatcher.router.reachable


async def gateway_main(process: Process, config: ClusterConfig) -> None:
    policy: Policy = policy_of(config)
    dispatcher = Dispatcher(policy, auth.derive(auth.load_secret(config.secret_file), "grpc"), metrics())
    client = EtcdClient(config.etcd)
    record = GatewayRecord(process.name, process.name, 1, process.incarnation, process=machine.identity())
    key = Keys.of(config).gateway(process.name)
    registration = Registration(client, key, encode(record), config.timing.node_lease_s)
    watch = ClusterWatch(client, config, dispatcher, presence=registration)
    process.part = GatewayPart(dispatcher)
    await asyncio.gather(watch.follow(), registration.run())
