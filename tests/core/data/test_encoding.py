"""An encoder's messages: what it says of stages that differ, and what it keeps for links that are down."""

from __future__ import annotations

import logging

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode
from dataplane._fast.checksum import crc32
from dataplane.core.messages import Fence, RestoredMeta, RestoreMeta, Shape, ShardMeta, SurvivorMeta
from dataplane.core.parity import encoders_of, ranked
from dataplane.core.prefix import NAME_BYTES
from dataplane.encoding import NOTHING, Encoding
from tests.core.data.instances import Instances
from tests.core.data.pipeline import done, here

SHARD = b"12345678"


def encoder(cluster: Instances) -> tuple[Encoding, list[bytes]]:
    """An encoder of p0's blocks whose links are all down, and names of which it has the parity."""
    me = cluster.topology.pipelines[1].stages[0].ranks[0]
    encoding = Encoding(me, here, lambda _peer, _meta, _payload: False, 1 << 20)
    encoding.apply(cluster.topology)
    names = [bytes([at]) * NAME_BYTES for at in range(256)]
    encoders = encoders_of(cluster.topology, "p0")
    return encoding, [name for name in names if ranked(name, encoders)[0] == me]


def arrive(encoding: Encoding, peer: Member, stage: int, shape: Shape, names: list[bytes]) -> None:
    meta = ShardMeta("p0", Fence(1), stage, shape, b"".join(names), (crc32(SHARD),) * len(names))
    done(encoding.handle(peer, meta, memoryview(SHARD * len(names)), 0.0))


def restore(encoding: Encoding, cluster: Instances, names: list[bytes], asker: Member) -> None:
    """Stage 1 has lost them; what is restored has no link."""
    p0, fence, packed = cluster.topology.pipelines[0], Fence(1), b"".join(names)
    done(encoding.handle(asker, RestoreMeta("p0", fence, 1, packed), NOTHING, 1.0))
    survivors = SurvivorMeta("p0", fence, 0, packed, (crc32(SHARD),) * len(names))
    done(encoding.handle(p0.stages[0].ranks[0], survivors, memoryview(SHARD * len(names)), 1.0))


def restored() -> tuple[Encoding, Instances]:
    """Each of its restored shards waits in a message of its own."""
    cluster = Instances(Mode.PARITY, 3, 2)
    p0 = cluster.topology.pipelines[0]
    encoding, names = encoder(cluster)
    encoding._send = lambda _peer, meta, _payload: not isinstance(meta, RestoredMeta)
    for stage in (0, 1):
        arrive(encoding, p0.stages[stage].ranks[0], stage, Shape("xor", 2, 1, 8), names)
    for name in names:
        restore(encoding, cluster, [name], p0.stages[1].ranks[0])
    assert len(names) > 3
    assert encoding._unsent
    return encoding, cluster


def test_restored_shards_that_nobody_waits_for_go() -> None:
    encoding, cluster = restored()
    p0, *others = cluster.topology.pipelines
    kept = list(encoding._unsent)
    encoding.apply(replace(cluster.topology, counter=cluster.topology.counter + 1))
    assert list(encoding._unsent) == kept, "the link may come back"
    encoding.apply(replace(cluster.topology, pipelines=(replace(p0, epoch=p0.epoch - 1), *others)))
    assert list(encoding._unsent) == kept, "who asked may know a newer topology"
    encoding.apply(replace(cluster.topology, pipelines=(replace(p0, epoch=p0.epoch + 1), *others)))
    assert not encoding._unsent, "of an epoch that is over"


def test_restored_shards_for_who_is_no_member_go() -> None:
    encoding, cluster = restored()
    p0, *others = cluster.topology.pipelines
    first, second = p0.stages
    another = replace(second, ranks=(Member("elsewhere", "1"),))
    encoding.apply(replace(cluster.topology, pipelines=(replace(p0, stages=(first, another)), *others)))
    assert not encoding._unsent


def test_what_waits_for_a_link_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataplane.encoding.UNSENT_BYTES", 3 * len(SHARD))
    encoding, _ = restored()
    assert sum(len(payload) for _, _, payload in encoding._unsent) == 3 * len(SHARD)
    encoding.link_changed("elsewhere")
    assert len(encoding._unsent) == 3


def test_stages_that_differ_are_named_once_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Instances(Mode.PARITY, 3, 2)
    peer = cluster.topology.pipelines[0].stages[0].ranks[0]
    encoding, names = encoder(cluster)
    caplog.set_level(logging.WARNING)
    arrive(encoding, peer, 0, Shape("xor", 2, 1, 8), names)
    assert not caplog.records
    for _ in range(3):
        arrive(encoding, peer, 1, Shape("rs", 2, 2, 8), names)
    assert [record.getMessage().count("parity.code") for record in caplog.records] == [1]
    p0 = cluster.topology.pipelines[0]
    later = replace(p0, epoch=p0.epoch + 1)
    encoding.apply(replace(cluster.topology, pipelines=(later, *cluster.topology.pipelines[1:])))
    arrive(encoding, peer, 1, Shape("rs", 2, 2, 8), names)
    assert len(caplog.records) == 2


def test_what_is_in_under_an_older_code_is_no_misfit(caplog: pytest.LogCaptureFixture) -> None:
    """A stage whose node has the newer code sends again what is protected already."""
    cluster = Instances(Mode.PARITY, 3, 2)
    peer = cluster.topology.pipelines[0].stages[0].ranks[0]
    encoding, names = encoder(cluster)
    caplog.set_level(logging.WARNING)
    for stage in range(2):
        arrive(encoding, peer, stage, Shape("xor", 2, 1, 8), names)
    arrive(encoding, peer, 0, Shape("rs", 2, 2, 8), names)
    assert not caplog.records
    assert all(encoding.encoder.is_complete(("p0", name)) for name in names)
