"""What is wrong with one pipeline of a topology ends none of its nodes, and costs the streams of others nothing."""

from __future__ import annotations

import asyncio
from itertools import count
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
from msgspec.structs import replace

from bench.kevlarflow_check import expected_tokens
from bench.kevlarflow_load import Request
from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode, Topology
from dataplane.core.holders import leaders_at
from dataplane.core.messages import Fence, Meta, Shape, ShardAckMeta, ShardMeta
from dataplane.core.parity import encoders_of, ranked
from dataplane.core.prefix import NAME_BYTES
from dataplane.encoding import Encoding
from tests.core.control.test_blemishes import SPOILS, Spoil
from tests.core.data.instances import Instances
from tests.core.data.pipeline import done, here

STAGES = 4
OUTPUT = 12
PROMPTS = {rid: tuple(range(100 * rid, 100 * rid + 9)) for rid in range(1, 7)}
MODES = [Mode.REPLICATE, Mode.PARITY, Mode.LOAD_AWARE]
spoils = pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__ for spoil in SPOILS])


def spoilt(cluster: Instances, spoil: Spoil) -> Topology:
    """Of p0; in the same epoch, as another hand may write it."""
    sim: Any = SimpleNamespace(nodes={me.node: SimpleNamespace(member=me) for me in cluster.nodes})
    p0, *others = cluster.topology.pipelines
    counter = cluster.topology.counter + 1
    return replace(cluster.topology, counter=counter, pipelines=(spoil(sim, p0), *others))


async def submit(cluster: Instances) -> list[int]:
    """The streams that p0 does not have, once each is somewhere. Those of p0 may wait until a topology is as it should
    be."""
    live, streams = cluster.router._live, cluster.router._streams
    await cluster.until(lambda: streams and all(streams.values()))
    for rid, prompt in PROMPTS.items():
        cluster.submit(rid, prompt, OUTPUT)
    await cluster.until(lambda: all(one.sent_to is not None for one in live.values()) and len(live) > 3)
    return [rid for rid in PROMPTS if rid not in live or live[rid].pipeline != "p0"]


async def end(cluster: Instances, others: list[int]) -> None:
    await cluster.until(lambda: cluster.ended.issuperset(others))
    turns = count()
    await cluster.until(lambda: next(turns) > 100)  # what p0 has still to do ends nobody either
    check(cluster, others)


def check(cluster: Instances, others: list[int]) -> None:
    assert len(others) >= 3
    assert not cluster.failed
    for rid in others:
        request = Request(0.0, PROMPTS[rid], OUTPUT, rid)
        assert cluster.received[rid] == expected_tokens([request], STAGES, 2048)[0]


@pytest.mark.parametrize("mode", MODES)
@spoils
def test_a_blemish_in_p0_ends_no_node_at_work(spoil: Spoil, mode: Mode) -> None:
    async def play() -> None:
        async with Instances(mode, 3, STAGES) as cluster:
            others = await submit(cluster)
            await cluster.until(lambda: all(map(len, cluster.received.values())))
            cluster.write(spoilt(cluster, spoil))
            await end(cluster, others)

    asyncio.run(play())


@pytest.mark.parametrize("mode", MODES)
@spoils
def test_a_blemish_in_p0_ends_no_node_that_starts_with_it(spoil: Spoil, mode: Mode) -> None:
    async def play() -> None:
        cluster = Instances(mode, 3, STAGES)
        cluster.topology = spoilt(cluster, spoil)
        async with cluster:
            await end(cluster, await submit(cluster))

    asyncio.run(play())


@spoils
def test_leaders_are_those_of_pipelines_that_have_the_stage(spoil: Spoil) -> None:
    cluster = Instances(Mode.LOAD_AWARE, 3, STAGES)
    for pipelines in (cluster.topology.pipelines, spoilt(cluster, spoil).pipelines):
        for stage in range(STAGES):
            wanted = {p.id: p.stages[stage].leader for p in pipelines if stage < len(p.stages)}
            assert leaders_at(pipelines, stage) == {name: one for name, one in wanted.items() if one}


@spoils
def test_an_encoder_tells_of_what_has_moved_whatever_is_left_of_the_pipeline(spoil: Spoil) -> None:
    """A node of p2 is cordoned no longer, so that another one than ours is to encode some of p0's blocks."""
    cluster = Instances(Mode.PARITY, 3, STAGES)
    p1, newcomer = cluster.topology.pipelines[1], "n11"
    me = p1.stages[0].ranks[0]
    before = replace(cluster.topology, cordoned=(newcomer,))
    bad = spoilt(cluster, spoil)
    encoders = encoders_of(before, "p0"), encoders_of(bad, "p0")
    names = [bytes([at]) * NAME_BYTES for at in range(256)]
    ours = [name for name in names if ranked(name, encoders[0])[0] == me]
    assert [name for name in ours if ranked(name, encoders[1])[0] != me]
    sent: list[Meta] = []

    def send(_peer: Member, meta: Meta, _payload: object) -> bool:
        sent.append(meta)
        return True

    encoding = Encoding(me, here, send, 1 << 20)
    encoding.apply(before)
    data = b"12345678" * len(ours)
    shape, sums = Shape("rs", STAGES, 2, 8), (crc32(b"12345678"),) * len(ours)
    shards = ShardMeta("p0", Fence(1), 1, shape, b"".join(ours), sums)
    done(encoding.handle(me, shards, memoryview(data), 0.0))
    assert len(encoding.encoder.names("p0")) == len(ours)
    encoding.apply(bad)
    done(encoding.pump(1.0))
    told = [meta for meta in sent if isinstance(meta, ShardAckMeta) and meta.whole]
    assert len(told) == (bad.pipelines[0].leader_at(0) is not None)
