"""KV of other numerics: a holder gets none, and what was computed again replaces what was copied before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from controlplane.contract.ids import Member
from dataplane._fast.blocktable import Rows
from dataplane.core.activations import in_precision
from dataplane.core.blocks import KvStore
from dataplane.core.messages import KvMeta, KvQueryMeta, pack_rows
from dataplane.core.replication import ANSWER_LIMIT_S, COPY_EVERY_S, Copy, ReplicaSource
from tests.core.data.pipeline import Cluster, done

HOLDER = Member("n4", "a")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_holder_of_other_numerics_gets_no_copies(stage: int) -> None:
    cluster = Cluster(3, seed=stage)
    server, peer = cluster.nodes[cluster.serving[stage]], cluster.nodes[cluster.peers[stage]]
    server.replicator.numerics, peer.replicator.numerics = "float32-cpu-1", "bfloat16-cpu-2"
    sent: list[object] = []
    real = cluster.send

    def send(source: Member, to: Member, meta: object, payload: bytes) -> bool:
        if (source, to) in {(server.me, peer.me), (peer.me, server.me)}:
            sent.append(meta)
        return real(source, to, meta, payload)  # type: ignore[arg-type]

    cluster.send = send  # type: ignore[method-assign]
    for rid in range(3):
        cluster.submit(rid, [rid + 1] * 9, 12)
    cluster.run_to_end()
    cluster.check()
    assert any(isinstance(meta, KvQueryMeta) for meta in sent)
    assert not any(isinstance(meta, KvMeta) for meta in sent)
    assert peer.replicator.stats.queries_refused > 0
    assert not peer.store.copies.rows
    others = [node for node in cluster.nodes.values() if node.stage_index != stage]
    assert any(node.replicator.stats.blocks_stored for node in others), "equal numerics are copied"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_its_takeover_is_computed_again(stage: int) -> None:
    cluster = Cluster(3, seed=stage)
    server, peer = cluster.nodes[cluster.serving[stage]], cluster.nodes[cluster.peers[stage]]
    server.replicator.numerics, peer.replicator.numerics = "old", "new"
    for rid in range(3):
        cluster.submit(rid, [rid + 1] * 9, 30)
    while min(map(len, cluster.received.values())) < 12:
        cluster.run(1)
    cluster.kill(stage)
    cluster.run_to_end()
    cluster.check()
    assert cluster.recoveries[-1].timing.tokens_recomputed >= 3 * (9 + 12 - 1)


def source(tokens: dict[int, int]) -> ReplicaSource:
    made = ReplicaSource(HOLDER, 4, lambda rid: tokens.get(rid, 0))
    made.must_ask(0.0)
    made.acknowledged((), whole=True, refused=False, now=0.0)
    made.wrote(tokens)
    return made


def test_what_was_computed_again_is_copied_again() -> None:
    made = source({1: 12})
    assert len(made.take(0.0)) == 3
    made.acknowledged(((1, 12),), whole=False, refused=False, now=0.1)
    made.rewrote(1, 12)  # the next token: nothing that the holder has
    assert made.lag_tokens([1]) == 0
    made.rewrote(1, 6)  # in the midst of the second block
    made.wrote([1])
    assert made.lag_tokens([1]) == 8
    assert made.take(COPY_EVERY_S) == [Copy(1, 1, 8), Copy(1, 2, 12)]
    made.acknowledged(((1, 12),), whole=False, refused=False, now=0.3)
    assert made.lag_tokens([1]) == 0


def test_an_answer_of_before_does_not_count_for_what_was_computed_again() -> None:
    made = source({1: 12})
    made.take(0.0)
    made.acknowledged(((1, 12),), whole=False, refused=False, now=0.1)
    made.restart()  # a new epoch: it is asked what it has ...
    assert made.must_ask(0.2)
    made.rewrote(1, 4)
    made.wrote([1])
    made.acknowledged(((1, 12),), whole=True, refused=False, now=0.3)  # ... and says so too late
    assert made.lag_tokens([1]) == 8
    assert made.take(0.4) == [Copy(1, 1, 8), Copy(1, 2, 12)]
    made.acknowledged(((1, 12),), whole=False, refused=False, now=0.5)
    assert not made.must_ask(0.5 + 2 * ANSWER_LIMIT_S)
    made.restart()
    made.must_ask(9.0)
    made.acknowledged(((1, 12),), whole=True, refused=False, now=9.0)
    assert made.lag_tokens([1]) == 0, "that was one answer's"


@pytest.mark.parametrize("start", [0, 4])
def test_a_rewound_request_has_new_copies(start: int) -> None:
    """Through a real pair of nodes: the copy's bytes are those that the source has now."""
    cluster = Cluster(1, seed=start)
    server, peer = cluster.nodes[cluster.serving[0]], cluster.nodes[cluster.peers[0]]
    cluster.submit(0, [5] * 9, 60)
    while len(cluster.received[0]) < 6 or not peer.store.copies.rows:
        cluster.run(1)
    cluster.run(20)
    key = ("p0", 0)
    row = server.store.table.blocks(server.store.own["p0"][0])
    tokens = server.store.tokens(key)
    step = Rows(pack_rows([(0, start, tokens - start, False)]))
    names = server.store.names_of(server.store.own["p0"][0])
    assert server.store.resume("p0", 0, names[: start // 4], 0)
    table_rows = server.store.begin("p0", step)
    assert table_rows is not None
    row = server.store.table.blocks(server.store.own["p0"][0])
    server.kv.data[row[start // 4 :]] ^= np.uint64(0x55)  # a stage before this one has other numerics now
    server.store.commit(table_rows, step, [bytes([index]) * 16 for index in range(start // 4, tokens // 4)])
    server.replicator.advanced("p0", step, [0])
    for _ in range(50):
        cluster.now += COPY_EVERY_S
        done(server.replicator.pump(cluster.now))
        while cluster.links.get((server.me, peer.me)):
            meta, payload = cluster.links[server.me, peer.me].popleft()
            peer.handle(server.me, meta, payload)
        while cluster.links.get((peer.me, server.me)):
            meta, payload = cluster.links[peer.me, server.me].popleft()
            server.handle(peer.me, meta, payload)
    first = start // 4
    copied = peer.store.table.blocks(peer.store.copies.rows[key])
    assert len(copied) == tokens // 4
    for index in range(first, tokens // 4):
        assert np.array_equal(peer.kv.data[copied[index]], server.kv.data[row[index]])


def test_activations_of_another_precision() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    bits[:9] = [
        0,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x3F808000,
        0x3F818000,
        0x7F7FFFFF,
        0x00000001,
    ]
    wide = torch.from_numpy(bits.view(np.float32).copy())
    narrow = wide.to(torch.bfloat16)
    got = np.frombuffer(in_precision(bits.tobytes(), len(bits), "bfloat16"), np.uint16)
    want = narrow.view(torch.int16).numpy().view(np.uint16)
    number = ~torch.isnan(wide).numpy()
    assert np.array_equal(got[number], want[number])
    assert np.isnan((got[~number].astype(np.uint32) << 16).view(np.float32)).all()
    back = np.frombuffer(in_precision(got.tobytes(), len(got), "float32"), np.float32)
    assert np.array_equal(back[number], narrow.float().numpy()[number])
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        data = bytes(12 * size)
        assert in_precision(data, 12, dtype) is data  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="activations"):
            in_precision(data, 11, dtype)  # type: ignore[arg-type]


def test_a_store_takes_a_copy_of_less() -> None:
    """What the watermark of a copy that is written again falls back to."""
    store = KvStore(8, 4, 4, 8)
    key = ("p0", 1)
    for index in range(3):
        assert store.copies.place(key, index, 4 * index + 4) is not None
        store.copies.written(key, index, 4 * index + 4, index)
    assert store.copies.tokens(key) == 12
    assert store.copies.place(key, 1, 8) is not None
    store.copies.written(key, 1, 8, 7)
    assert store.copies.tokens(key) == 8
