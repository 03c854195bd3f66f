"""What reads or writes more than a few small blocks of KV runs in a thread, never on the event loop, and what was
promoted unread is read before anything that was computed from it leaves the node."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from controlplane.contract.ids import Member
from controlplane.contract.requests import Sampling
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane import kvwork
from dataplane.core.blocks import KvStore
from dataplane.core.messages import (
    Admit,
    Begin,
    Block,
    Fence,
    HeldMeta,
    KvAckMeta,
    KvMeta,
    KvQueryMeta,
    Meta,
    RejoinMeta,
    ResultMeta,
    StepFailedMeta,
    StepMeta,
    pack_rows,
)
from dataplane.core.prefix import PrefixHasher
from dataplane.inbox import Message
from dataplane.kvwork import AT_ONCE_BYTES, KvBytes, KvThread
from dataplane.worker import Worker
from tests.core.data.line import BLOCK, LIMIT_S, Line, oracles, step

ME, PEER, OTHER = Member("n0", "a"), Member("n1", "a"), Member("n2", "a")
PROMPT = list(range(100, 112))  # three whole blocks
NAMES = PrefixHasher(BLOCK).extend(PROMPT)
TICKS = 20  # of the loop, while a call on KV is held up


def serves(who: Member, replica: Member, epoch: int) -> Topology:
    return Topology("g", epoch, Mode.NONE, (Pipeline("p", epoch, (Stage((who.node,), (who,), (replica,)),)),))


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


class Alone:
    """One worker of a pipeline of one stage; `sent` is all that left it."""

    def __init__(self, blocks: int = 64) -> None:
        self.sent: list[tuple[Member, Meta, bytes]] = []
        (self.executor,) = oracles(1, blocks)
        self.store = KvStore(blocks, BLOCK, 64, 16)
        self.worker = Worker(ME, self.executor, self.store, self._send)

    def _send(self, peer: Member, meta: Meta, payload: Any) -> bool:
        self.sent.append((peer, meta, memoryview(payload).tobytes()))
        return True

    @property
    def answers(self) -> list[Any]:
        return self.metas(ResultMeta) + self.metas(StepFailedMeta)

    def metas(self, kind: type) -> list[Any]:
        return [meta for _, meta, _ in self.sent if isinstance(meta, kind)]

    async def until(self, condition: Callable[[], object], *items: Any) -> None:
        """Give the worker these items and let it run until the condition holds."""
        for item in items:
            self.worker.put(item)
        task = asyncio.create_task(self.worker.run())
        deadline = time.monotonic() + LIMIT_S
        try:
            while not condition():
                assert time.monotonic() < deadline, self.sent
                if task.done():
                    task.result()
                self.worker.wake()
                await asyncio.sleep(0)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def hold_copies(self, damage: int | None = None) -> None:
        """A copy of a request of another node's: the KV of PROMPT. `damage`: of one block, once it is here."""
        line = Line(oracles(1), ["p"])
        await line.run([step("p", 0, [(1, 0, PROMPT)])], 1)
        (kv,) = line.kv("p")
        line.close()
        blocks = tuple(
            Block(1, i, BLOCK * (i + 1), zlib.crc32(data), NAMES[i]) for i, data in enumerate(kv[1])
        )
        copies = Message(PEER, KvMeta("p", Fence(1), blocks), memoryview(bytearray(b"".join(kv[1]))))
        await self.until(lambda: self.metas(KvAckMeta), serves(PEER, ME, 1), copies)
        assert self.metas(KvAckMeta) == [KvAckMeta("p", Fence(1), ((1, len(PROMPT)),))]
        if damage is not None:
            row = self.store.copies.rows["p", 1]
            self.executor.kv.view(self.store.table.block(row, damage))[3] ^= 4

    def rejoin(self, ask: int, round_: int = 0) -> Message:
        return Message(ME, RejoinMeta("p", Fence(2, round_), ask, (1,), False, (b"".join(NAMES),)))


def held_up(monkeypatch: pytest.MonkeyPatch, name: str, ticks: list[int]) -> list[str]:
    """Calls of a method of KvBytes wait until the loop has ticked on; on the loop they would wait for ever."""
    original, threads = getattr(KvBytes, name), []

    def call(kv: KvBytes, *arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        begin, deadline = ticks[0], time.monotonic() + LIMIT_S
        while ticks[0] < begin + TICKS:
            assert time.monotonic() < deadline, f"the loop stood still while {name} ran"
            time.sleep(0.001)  # a thread, not the loop
        return original(kv, *arguments)

    monkeypatch.setattr(KvBytes, name, call)
    return threads


async def ticking(ticks: list[int]) -> None:
    while True:
        ticks[0] += 1
        await asyncio.sleep(0)


@on_a_loop
async def test_heartbeats_go_on_whatever_is_done_with_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies stored, a takeover, its first step, copies sent: each call on KV lasts until the loop has gone on."""
    monkeypatch.setattr(kvwork, "AT_ONCE_BYTES", 0)  # blocks of a real model are not done at once
    ticks = [0]
    threads = {name: held_up(monkeypatch, name, ticks) for name in ("gather", "sums", "sums_of", "scatter")}
    heart = asyncio.create_task(ticking(ticks))
    alone = Alone()
    await alone.hold_copies()
    await alone.until(lambda: alone.metas(HeldMeta), serves(ME, OTHER, 2), alone.rejoin(1))
    go_on = resumed(ResultMeta("p", Fence(1), 0, b"\0\0\0\0"), len(PROMPT), [7], Fence(2))
    await alone.until(lambda: alone.answers, go_on)
    assert alone.metas(ResultMeta)
    await alone.until(lambda: alone.metas(KvQueryMeta))
    answer = Message(OTHER, KvAckMeta("p", Fence(2), (), whole=True))
    await alone.until(lambda: alone.metas(KvMeta), answer)
    heart.cancel()
    for name, where in threads.items():
        assert where, f"{name} was not called"
        assert {thread.partition("_")[0] for thread in where} == {"kv"}, name
    alone.worker.close()


@on_a_loop
async def test_a_promotion_reads_nothing() -> None:
    """A table entry: neither the answer to the scheduler nor anything before it waits for a byte of KV."""
    alone = Alone()
    await alone.hold_copies()
    store = alone.store
    blocks = store.table.blocks(store.copies.rows["p", 1])
    alone.executor.kv._blocks = None  # whoever reads now fails
    assert store.take_up("p", 1, NAMES) == len(PROMPT)
    assert store.table.blocks(store.own["p"][1]) == blocks
    assert store.verified_tokens(("p", 1)) == 0  # of it nothing goes to others yet
    store.leave("p", demote=True)
    assert store.copies.tokens(("p", 1)) == len(PROMPT)
    alone.worker.close()


@pytest.mark.parametrize("start", [len(PROMPT), 2 * BLOCK, BLOCK])
@pytest.mark.parametrize("damage", [None, 0, 1, 2])
@on_a_loop
async def test_nothing_computed_from_a_damaged_copy_leaves_the_node(damage: int | None, start: int) -> None:
    """The first step finds it, whatever else it finds time for; only what is damaged is computed again."""
    line = Line(oracles(1), ["p"])
    (first,) = await line.run([step("p", 0, [(1, 0, PROMPT)])], 1)
    (reference,) = await line.run([step("p", 1, [(1, len(PROMPT), [7])])], 1)
    line.close()
    assert isinstance(first, ResultMeta)
    assert isinstance(reference, ResultMeta)

    alone = Alone()
    await alone.hold_copies(damage)
    go_on = resumed(first, start, [*PROMPT, 7][start:], Fence(2))
    await alone.until(lambda: alone.answers, serves(ME, OTHER, 2), alone.rejoin(1), go_on)
    assert alone.metas(HeldMeta) == [HeldMeta("p", Fence(2), 1, 0, ((1, len(PROMPT)),))]
    if damage is not None and BLOCK * damage < start:  # else it is written again anyway
        assert not alone.metas(ResultMeta)
        (failed,) = alone.metas(StepFailedMeta)
        assert (failed.reason, failed.rids) == ("gap", ())
        assert alone.store.checksum_failures == 1
        alone.sent.clear()
        await alone.until(lambda: alone.metas(HeldMeta), alone.rejoin(2, 1))
        (held,) = alone.metas(HeldMeta)
        assert held.held == (((1, BLOCK * damage),) if damage else ())
        lost = [*PROMPT[BLOCK * damage :], 7]
        await alone.until(lambda: alone.answers, resumed(first, BLOCK * damage, lost, Fence(2, 1)))
    (result,) = alone.metas(ResultMeta)
    assert result.tokens == reference.tokens
    assert result.details == reference.details
    assert alone.store.checksum_failures <= (damage is not None)
    assert not alone.store.checksums.unverified
    alone.worker.close()


def resumed(first: ResultMeta, start: int, tokens: list[int], fence: Fence) -> Message:
    """The request's next step after a change of fence: its last stage is told what it must know again."""
    admit = Admit(1, Sampling(100, seed=1, logprobs=8), b"", first.tokens)
    rows, begin = pack_rows([(1, start, len(tokens), True)]), Begin(1, b"".join(NAMES[: start // BLOCK]))
    meta = StepMeta("p", fence, 0, rows, (admit,), begins=(begin,))
    return Message(ME, meta, b"", tuple(tokens))


@on_a_loop
async def test_what_nobody_asks_for_is_looked_at_in_idle_time() -> None:
    alone = Alone()
    await alone.hold_copies(damage=1)
    await alone.until(
        lambda: alone.metas(HeldMeta) and not alone.store.checksums.unverified,
        serves(ME, OTHER, 2),
        alone.rejoin(1),
    )
    assert alone.store.tokens(("p", 1)) == BLOCK
    assert alone.store.checksum_failures == 1
    alone.worker.close()


@on_a_loop
async def test_a_damaged_block_is_not_handed_on_with_a_checksum_of_its_own() -> None:
    """Else the next holder would take it for sound. Only whole blocks before it are copied."""
    alone = Alone()
    await alone.hold_copies(damage=1)
    await alone.until(lambda: alone.metas(KvQueryMeta), serves(ME, OTHER, 2), alone.rejoin(1))
    answer = Message(OTHER, KvAckMeta("p", Fence(2), (), whole=True))
    await alone.until(lambda: alone.metas(KvMeta), answer)
    assert [[(b.index, b.tokens) for b in meta.blocks] for meta in alone.metas(KvMeta)] == [[(0, BLOCK)]]
    alone.worker.close()


@on_a_loop
async def test_a_bit_that_turns_in_served_kv_is_not_copied_to_a_second_holder() -> None:
    """Its checksum is known from the first time that it was copied: the request is computed again from there."""
    alone = Alone()
    start = step("p", 0, [(1, 0, PROMPT)])
    await alone.until(
        lambda: alone.metas(ResultMeta) and alone.metas(KvQueryMeta), serves(ME, PEER, 1), start
    )
    await alone.until(lambda: alone.metas(KvMeta), Message(PEER, KvAckMeta("p", Fence(1), (), whole=True)))
    row = alone.store.own["p"][1]
    alone.executor.kv.view(alone.store.table.block(row, 1))[0] ^= 1
    alone.sent.clear()
    await alone.until(lambda: alone.metas(KvQueryMeta), serves(ME, OTHER, 2))
    answer = Message(OTHER, KvAckMeta("p", Fence(2), (), whole=True))
    await alone.until(lambda: alone.store.checksum_failures, answer)
    assert alone.store.tokens(("p", 1)) == BLOCK
    assert not any(block.index >= 1 for meta in alone.metas(KvMeta) for block in meta.blocks)
    alone.worker.close()


@on_a_loop
async def test_only_few_bytes_are_worked_on_at_once_and_nothing_overtakes_the_thread() -> None:
    thread, order, begun, go_on = KvThread(AT_ONCE_BYTES), list[str](), threading.Event(), threading.Event()

    def large() -> str:
        begun.set()
        assert go_on.wait(LIMIT_S)
        order.append("large")
        return threading.current_thread().name

    def small() -> str:
        order.append("small")
        return threading.current_thread().name

    here = threading.current_thread().name
    assert await thread(small, size=AT_ONCE_BYTES) == here
    assert await thread(small, size=AT_ONCE_BYTES + 1) != here
    assert await thread(small) != here, "it may be any number of bytes"
    order.clear()
    first = asyncio.create_task(thread(large))
    assert await asyncio.to_thread(begun.wait, LIMIT_S)
    second = asyncio.create_task(thread(small, size=1))
    await asyncio.sleep(0)
    assert order == []
    go_on.set()
    assert await first == await second != here
    assert order == ["large", "small"]
    thread.close()


def test_pieces_of_work_on_kv_are_bounded() -> None:
    """A step that comes meanwhile waits for one piece, not for a window of blocks of many megabytes."""

    class Large:
        block_bytes = 3 << 20
        pool = None

    assert KvBytes(Large()).piece_blocks == 1  # type: ignore[arg-type]
    (executor,) = oracles(1)
    assert KvBytes(executor.kv).piece_blocks * executor.kv.block_bytes <= 4 << 20


def test_gathering_and_scattering_are_each_others_opposite() -> None:
    (executor,) = oracles(1)
    kv, rng = executor.kv, np.random.default_rng(1)
    kv.pool[:] = rng.integers(0, 256, kv.pool.shape, np.uint8)
    work = KvBytes(kv)
    data, sums = work.gather([5, 3, 9])
    assert bytes(data) == b"".join(bytes(kv.view(block)) for block in (5, 3, 9))
    assert sums.tolist() == [zlib.crc32(kv.view(block)) for block in (5, 3, 9)]
    assert work.sums([9, 5]).tolist() == [sums[2], sums[0]]
    assert work.sums_of(memoryview(data)[:-1]).tolist() == sums.tolist()[:2]
    work.scatter([1, 2], memoryview(data), [2, 0])
    assert bytes(kv.view(1)) == bytes(kv.view(9))
    assert bytes(kv.view(2)) == bytes(kv.view(5))
    for wrong in ([64], [-1]):
        with pytest.raises(IndexError):
            work.sums(wrong)
    with pytest.raises(IndexError):
        work.scatter([1], memoryview(data), [3])
