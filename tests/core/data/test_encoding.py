"""An encoder's messages: what it says of stages that differ, and what it keeps for links that are down."""

from __future__ import annotations

import logging

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode
from dataplane._fast.checksum import crc32
from dataplane.core.messages import Fence, Shape, ShardMeta
from dataplane.core.parity import encoders_of, ranked
from dataplane.core.prefix import NAME_BYTES
from dataplane.encoding import Encoding
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
