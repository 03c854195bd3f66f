"""Switches that take one safeguard of production code away, to see whether the simulator notices.

They patch from outside: production code has no flag that could be left on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

import controlplane.core.detector
from controlplane.contract import schema
from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Pipeline
from controlplane.core.evidence import Evidence, judge
from controlplane.core.policy import Situation
from controlplane.etcd.election import Leadership
from controlplane.etcd.register import Registration
from controlplane.etcd.values import Compare
from dataplane import encoding, parity, parity_bytes
from dataplane.core.encoder import Encoder
from dataplane.core.messages import Fence, KvMeta, KvQueryMeta, RejoinMeta, StepMeta
from dataplane.core.replication import Copy, ReplicaSource
from dataplane.core.stage import Stage
from dataplane.inbox import Message
from dataplane.kvwork import KvBytes, Sums
from dataplane.worker import Worker
from web.gateway.routing.tokenlog import TokenLog, Verdict


@contextlib.contextmanager
def no_epoch_check() -> Iterator[None]:
    """Workers do what messages of older epochs and rounds say."""
    admissible = Worker._admissible

    def anything(worker: Worker, message: Message) -> bool:
        meta: Any = message.meta
        pipeline: Pipeline | None = worker.topology.pipeline(meta.pipeline) if worker.topology else None
        if pipeline is None or meta.fence.epoch >= pipeline.epoch:
            return admissible(worker, message)
        if isinstance(meta, StepMeta | RejoinMeta):
            return meta.pipeline in worker.stages
        return not isinstance(meta, KvMeta | KvQueryMeta) or worker._holds(pipeline)

    def never(stage: Stage, fence: Fence) -> bool:
        return False

    with mock.patch.object(Worker, "_admissible", anything), mock.patch.object(Stage, "stale", never):
        yield


@contextlib.contextmanager
def no_leadership_guard() -> Iterator[None]:
    """A leader's writes no longer say "if I still lead"."""

    def always(leadership: Leadership) -> Compare:
        return Compare.absent("/never/written")

    with mock.patch.object(Leadership, "guard", always):
        yield


@contextlib.contextmanager
def no_watermark_rule() -> Iterator[None]:
    """A copy counts as held when it has been sent."""
    take = ReplicaSource.take

    def sent_is_held(source: ReplicaSource, now: float, limit: int | None = None) -> list[Copy]:
        copies = take(source, now, limit)
        for copy in copies:
            source._progress[copy.rid].acked = copy.tokens
        return copies

    with mock.patch.object(ReplicaSource, "take", sent_is_held):
        yield


@contextlib.contextmanager
def no_checksums() -> Iterator[None]:
    """Copies are taken for sound, whatever their checksums say."""
    gather = KvBytes.gather

    def gathered(kv: KvBytes, blocks: Sequence[int]) -> tuple[bytearray, Sums]:
        return gather(kv, blocks)[0], np.zeros(len(blocks), np.uint32)

    def of_blocks(kv: KvBytes, blocks: Sequence[int]) -> Sums:
        return np.zeros(len(blocks), np.uint32)

    def of_message(kv: KvBytes, payload: memoryview) -> Sums:
        return np.zeros(len(payload) // kv.block_bytes, np.uint32)

    def of_pieces(payload: memoryview, size: int) -> Sums:
        return np.zeros(len(payload) // size, np.uint32)

    with (
        mock.patch.object(KvBytes, "gather", gathered),
        mock.patch.object(KvBytes, "sums", of_blocks),
        mock.patch.object(KvBytes, "sums_of", of_message),
        mock.patch.object(encoding, "piece_sums", of_pieces),
        mock.patch.object(parity, "piece_sums", of_pieces),
        mock.patch.object(parity_bytes, "piece_sums", of_pieces),
    ):
        yield


@contextlib.contextmanager
def no_position_check() -> Iterator[None]:
    """The gateway takes every token of the newest epoch for the next one."""

    def next_one(log: TokenLog, token: Any, epoch: int) -> Verdict:
        if epoch < log.fence:
            return Verdict.STALE
        log.emitted.append(token.token)
        log.finish = token.finish
        return Verdict.NEXT

    with mock.patch.object(TokenLog, "accept", next_one):
        yield


@contextlib.contextmanager
def no_second_kind() -> Iterator[None]:
    """Who is not heard for long enough is dead, whatever else is known."""

    def hasty(e: Evidence, timing: TimingConfig) -> tuple[NodeState, str]:
        state, why = judge(e, timing)
        if state is NodeState.YELLOW and not e.neighbour_hears and e.silent_s >= timing.dead_after_s:
            return NodeState.RED, f"silent for {e.silent_s:.1f} s"
        return state, why

    detector = controlplane.core.detector
    with (
        mock.patch.object(detector, "judge", hasty),
        mock.patch.object(detector, "may_live", return_value=False),
    ):
        yield


@contextlib.contextmanager
def no_fenced_names() -> Iterator[None]:
    """Whoever registers has the name, as if the other one were certainly dead."""
    with mock.patch.object(Registration, "_may_replace", return_value=True):
        yield


@contextlib.contextmanager
def no_schema_check() -> Iterator[None]:
    """Values of newer code are taken for our own."""
    with mock.patch.object(schema, "schema_of", return_value=1):
        yield


@contextlib.contextmanager
def no_unknown_fields() -> Iterator[None]:
    """A rewrite has what this code knows, and nothing else."""
    with mock.patch.object(schema, "_has_unknown", return_value=False):
        yield


@contextlib.contextmanager
def no_complete_chunks() -> Iterator[None]:
    """An encoder takes a name for complete when it has the shard of any stage."""
    with mock.patch.object(Encoder, "_all_in", return_value=True):
        yield


@contextlib.contextmanager
def no_checksum_of_restored() -> Iterator[None]:
    """What was worked out from parity is taken for what had gone in."""
    with mock.patch.object(Encoder, "_sound", return_value=True):
        yield


@contextlib.contextmanager
def no_near_copies() -> Iterator[None]:
    """A copy is taken for near when it has only begun."""

    def always(situation: Situation, pipeline: Pipeline, stage: int, copy: Member) -> bool:
        return True

    with mock.patch.object(Situation, "near", always):
        yield


SAFEGUARDS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "epoch": no_epoch_check,
    "guard": no_leadership_guard,
    "watermark": no_watermark_rule,
    "checksum": no_checksums,
    "position": no_position_check,
    "kinds": no_second_kind,
    "near": no_near_copies,
    "names": no_fenced_names,
    "schema": no_schema_check,
    "unknown": no_unknown_fields,
    "complete": no_complete_chunks,
    "restored": no_checksum_of_restored,
}
