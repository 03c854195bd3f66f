"""Steps of several pipelines in one pass of a node: who may come along, and what each gets of it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import numpy as np
import pytest

from controlplane.contract.ids import Member
from dataplane.core.messages import Fence, KvDropMeta, KvMeta, RejoinMeta, ResultMeta, StepFailedMeta
from dataplane.core.rhythm import CLOSE, PATIENCE, STEPS, Rhythm
from dataplane.devices import A10_LLAMA_8B_QUARTER, LIGHT_TOKENS_MAX, PROFILES
from dataplane.inbox import INBOX_MAX, LOOK_MAX, Inbox, Item, LinkChanged, Message, Wake, company
from tests.core.data.line import LIMIT_S, Line, oracles, step, topology

N1 = Member("n1", "a")
P = step("p", 0, [(1, 0, [5])])
FIRST: Any = P.meta  # type: ignore[union-attr]
Q = step("q", 0, [(2, 0, [6, 7])])
R = step("r", 0, [(3, 0, [8])])


def other(meta: Any) -> Message:
    return Message(N1, meta)


def rejoin(pipeline: str) -> Message:
    return other(RejoinMeta(pipeline, Fence(1), 1, (), False))


# ---------------------------------------------------------------------- who may come along


@pytest.mark.parametrize(
    ("waiting", "places"),
    [
        ([], []),
        ([Q], [0]),
        ([Wake(), Q], [1]),
        ([Q, R], [0, 1]),  # two failures in two instances: three pipelines on one node
        ([P, Q], [1]),  # the next microbatch of the same pipeline waits for its turn
        ([Q, step("q", 1, [(4, 0, [6])])], [0]),
        ([rejoin("q"), Q], []),
        ([other(KvDropMeta("q", Fence(1), (9,))), Q, R], [2]),
        ([rejoin("p"), other(KvMeta("r", Fence(1), ())), Q, R], [2]),
        ([LinkChanged("n1"), Q], []),
        ([topology("pq", 2), Q], []),
        (
            [step("q", 0, [], frees=(2,)), step("q", 1, [(4, 0, [6])]), R],
            [2],
        ),  # nothing to compute: in its turn
        ([Wake()] * LOOK_MAX + [Q], []),
    ],
)
def test_no_pipelines_items_change_places(waiting: list[Item], places: list[int]) -> None:
    assert [place for place, _ in company(waiting, FIRST, 8)] == places


def test_tokens_are_bounded_and_what_does_not_fit_lets_others_pass() -> None:
    for room, places in ((0, []), (1, []), (2, [1]), (3, [0]), (4, [0, 1])):
        assert [place for place, _ in company([Q, R], FIRST, room)] == places, room
    large = step("q", 0, [(2, 0, list(range(9)))])
    after = step("q", 1, [(4, 0, [1])])
    assert company([large, after], FIRST, 8) == []  # not the one behind it instead


def test_an_inbox_keeps_its_order() -> None:
    async def take() -> None:
        inbox = Inbox()
        for item in (Wake(), Q, LinkChanged("n1"), R):
            assert inbox.put(item)
        assert inbox.take_company(FIRST, 8) == [Q]
        inbox.put_back([P, R])  # type: ignore[list-item]
        got = [await inbox.get() for _ in range(len(inbox))]
        assert got == [P, R, Wake(), LinkChanged("n1"), R]
        waiting = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        inbox.put(Q)
        assert await waiting == Q
        given_up = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        inbox.put(R)  # nobody waits any more, and nothing is lost with who did
        assert await inbox.get() == R

    asyncio.run(take())


def test_copies_of_others_pass_a_step_that_waits() -> None:
    copies = (KvMeta, KvDropMeta)
    own, copy = other(KvMeta("p", Fence(1), ())), other(KvMeta("q", Fence(1), ()))
    for items, taken, left_is_behind in (
        ([Wake(), own, copy, Q], copy, False),
        ([own, Q, copy], None, False),  # not past a step of its pipeline
        ([topology("pq", 2), copy], None, False),
        ([own, P, Wake()], None, True),
        ([rejoin("q")], None, False),
    ):
        inbox = Inbox()
        for item in items:
            inbox.put(item)
        assert inbox.waits_only("p") is left_is_behind
        assert inbox.take_other("p", copies) is taken
        assert len(inbox) == len(items) - (taken is not None)


def test_an_inbox_is_bounded_but_for_topologies() -> None:
    inbox = Inbox()
    assert all(inbox.put(Wake()) for _ in range(INBOX_MAX))
    assert not inbox.put(Wake())
    assert inbox.put(topology("p", 1))
    assert len(inbox) == INBOX_MAX + 1


# ---------------------------------------------------------------------- what each gets of it


def run(line: Line, items: list[Item], answers: int) -> dict[str, ResultMeta | StepFailedMeta]:
    try:
        return {answer.pipeline: answer for answer in asyncio.run(line.run(items, answers))}
    finally:
        line.close()


def results(line: Line, items: list[Item]) -> dict[str, ResultMeta | StepFailedMeta]:
    return run(line, items, len(items))


def test_a_merged_step_brings_what_the_steps_bring_alone() -> None:
    p = step("p", 0, [(1, 0, [5, 6, 7, 8, 9]), (2, 0, [4])])
    q = step("q", 0, [(1, 0, [50, 60]), (7, 0, [9, 9, 9])])
    r = step("r", 0, [(3, 0, [1])])
    alone = [Line(oracles(3), name) for name in "pqr"]
    want = {
        k: v for line, item in zip(alone, (p, q, r), strict=True) for k, v in results(line, [item]).items()
    }
    line = Line(oracles(3), "pqr")
    assert results(line, [p, q, r]) == want
    assert line.merged == [2, 2, 2]
    assert [worker.stats.steps for worker in line.workers] == [3, 3, 3]
    for own, name in zip(alone, "pqr", strict=True):
        assert own.merged == [0, 0, 0]
        assert own.kv(name) == line.kv(name)
        assert [item for item in line.passed if item[0] == name] == own.passed
    # One pass is one step of its device.
    for worker in line.workers:
        assert [(times.size >> 8, times.steps) for times in worker.compute.pace.report()] == [
            ((12).bit_length(), 1)
        ]


def test_a_step_that_cannot_run_fails_alone() -> None:
    for broken, reason in (
        (step("q", 0, [(2, 8, [6])]), "gap"),
        (step("q", 0, [(2, 0, list(range(40)))]), "space"),
    ):
        for items in ([P, broken], [broken, P]):
            line = Line(oracles(1, blocks=8), "pq", blocks=8)
            found = results(line, items)
            assert isinstance(found["p"], ResultMeta)
            assert isinstance(found["q"], StepFailedMeta)
            assert found["q"].reason == reason
            assert line.merged == [0]
            assert line.workers[0].stats.steps == 1


@pytest.mark.parametrize("old_first", [True, False])
def test_a_step_of_an_epoch_that_is_over_or_to_come_is_not_taken_along(old_first: bool) -> None:
    """The old one is fenced; the coming one waits for its topology, and then runs before what came behind it."""
    line = Line(oracles(1), "pq")
    line.workers[0].put(topology("pq", 1, epoch=5))
    p, old = step("p", 0, [(1, 0, [5])], epoch=5), step("q", 9, [(2, 0, [6])], epoch=4)
    coming, behind = step("q", 0, [(2, 0, [6])], epoch=6), step("q", 1, [(2, 1, [7])], epoch=6)
    found: list[tuple[str, int, int]] = []

    async def before_and_after() -> None:
        for items, count in (
            ([p, old, coming] if old_first else [p, coming, old], 1),
            ([topology("pq", 1, epoch=6), step("p", 1, [(1, 0, [5])], epoch=6), behind], 3),
        ):
            answers = await line.run(items, count)
            assert all(isinstance(answer, ResultMeta) for answer in answers)
            found.extend((a.pipeline, a.fence.epoch, a.step) for a in answers)

    asyncio.run(before_and_after())
    line.close()
    assert found == [("p", 5, 0), ("q", 6, 0), ("p", 6, 1), ("q", 6, 1)]
    assert line.workers[0].stats.fenced == {"step": 1}


class Spoilt:
    """An executor whose activations are floats, not finite at the tokens named."""

    def __init__(self, inner: Any, bad: list[int]) -> None:
        self._inner, self._bad = inner, bad
        self.suspect = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, *arguments: Any) -> Any:
        tokens = len(self._inner.forward(*arguments))
        out = np.zeros((tokens, 2), np.float32)
        out[self._bad] = np.nan
        return out


@pytest.mark.parametrize(
    ("bad", "blamed"), [([5], {"q": (7,)}), ([1, 4], {"p": (1,), "q": (1,)}), ([3], {"p": (2,)})]
)
def test_only_those_whose_numbers_they_are_are_blamed(
    bad: list[int], blamed: dict[str, tuple[int, ...]]
) -> None:
    p = step("p", 0, [(1, 0, [5, 6, 7]), (2, 0, [4])])
    q = step("q", 0, [(1, 0, [50]), (7, 0, [9])])
    first, last = oracles(2)
    line = Line([Spoilt(first, bad), last], "pq")
    found = run(line, [p, q], len(blamed)) if len(blamed) == 2 else run_first(line, [p, q])
    assert {k: v.rids for k, v in found.items() if isinstance(v, StepFailedMeta)} == blamed
    assert {name for name, _, _ in line.passed} == {"p", "q"} - blamed.keys()
    assert line.merged[0] == 1
    assert line.workers[0].stats.poisoned == len(blamed)
    for name in blamed:  # not committed
        store = line.workers[0]._store
        assert all(store.tokens((name, rid)) == 0 for rid in store.own[name])


def run_first(line: Line, items: list[Item]) -> dict[str, ResultMeta | StepFailedMeta]:
    """The last stage is not asked: floats are no hashes."""
    line.workers[1].put = lambda item: None  # type: ignore[method-assign]
    return run(line, items, 1)


def test_a_device_takes_the_fixed_part_of_a_merged_step_once() -> None:
    profile = dataclasses.replace(A10_LLAMA_8B_QUARTER, fixed_s=0.2)
    executor = oracles(1, profile=profile)[0]
    line = Line([executor], "pq")
    results(line, [P, Q])
    assert line.merged == [1]
    assert executor.step_s == pytest.approx(profile.step_s(3, 3), rel=0.01)
    assert executor.step_s < 0.21


def test_light_steps() -> None:
    light = A10_LLAMA_8B_QUARTER.light_tokens
    none, one = A10_LLAMA_8B_QUARTER.step_s(0, 0), A10_LLAMA_8B_QUARTER.step_s(light, 0)
    assert light == 750
    assert one <= 2 * none
    short = dataclasses.replace(A10_LLAMA_8B_QUARTER, fixed_s=0.001)
    assert (
        short.step_s(short.light_tokens, 0)
        <= 2 * short.step_s(0, 0)
        < short.step_s(short.light_tokens + 1, 0)
    )
    assert PROFILES["instant"].light_tokens == LIGHT_TOKENS_MAX


# ---------------------------------------------------------------------- who waits for company


def busy(worker: Any, alone_s: float) -> None:
    """It has served p and q in turn, faster than one by one."""
    worker._rhythm = Rhythm()
    worker._rhythm.ran(1, alone_s)
    for _ in range(STEPS // 2):
        worker._rhythm.came("p", time.monotonic())
        worker._rhythm.came("q", time.monotonic())


async def late(line: Line, items: list[Item], wait_s: float, answers: int = 2) -> float:
    """P at once and these items later; how long it took until the answers were there."""
    began = time.monotonic()
    asyncio.get_running_loop().call_later(wait_s, lambda: [line.workers[0].put(item) for item in items])
    await line.run([P], answers)
    return time.monotonic() - began


def test_a_step_waits_for_another_pipelines_step_and_runs_with_it() -> None:
    copy = other(KvDropMeta("q", Fence(1), (9,)))
    line = Line(oracles(1), "pq")
    busy(line.workers[0], alone_s=5.0)
    try:
        assert asyncio.run(late(line, [copy, Q], 0.05)) < 2.0
    finally:
        line.close()
    assert line.merged == [1]
    assert sorted(answer.pipeline for answer in line.answers) == ["p", "q"]


def test_it_does_not_wait_for_ever_nor_for_what_is_urgent() -> None:
    line = Line(oracles(1), "pq")
    busy(line.workers[0], alone_s=0.1)
    try:
        assert asyncio.run(late(line, [Q], 0.4)) > 0.4
    finally:
        line.close()
    assert line.merged == [0]

    line = Line(oracles(1), "pq")
    busy(line.workers[0], alone_s=LIMIT_S)
    urgent = topology("pq", 1, epoch=2)
    try:
        assert asyncio.run(late(line, [urgent], 0.05, answers=1)) < LIMIT_S / 2
    finally:
        line.close()
    assert line.merged == [0]


def rhythm(every_s: float, pipelines: str = "pq", alone_s: float = 1.0, shared_s: float = 0.0) -> float:
    """How long p waits, where steps come in turn, one every so many seconds."""
    made = Rhythm()
    made.ran(1, alone_s)
    if shared_s:
        made.ran(2, shared_s)
    for number in range(STEPS):
        assert made.patience_s("p", number * every_s) == 0.0, "too few steps to judge by"
        made.came(pipelines[number % len(pipelines)], number * every_s)
    return made.patience_s("p", STEPS * every_s)


def test_who_waits() -> None:
    assert rhythm(every_s=0.6) == PATIENCE
    assert rhythm(every_s=0.6, shared_s=1.1) == PATIENCE
    assert rhythm(every_s=1.2) == 0.0, "the node keeps up"
    assert rhythm(every_s=0.6, pipelines="p") == 0.0, "nobody else comes"
    assert rhythm(every_s=0.6, shared_s=1.8) == 0.0, "it saves too little"


def test_a_step_waits_for_the_next_chunk_of_anothers_prompt() -> None:
    made = Rhythm()
    made.ran(1, 1.0)
    assert made.chunk_s("p", 8, 0.0) == 0.0, "no prompt goes on"
    made.goes_on("q", 8, 5.0)
    assert made.chunk_s("p", 8, 5.1) == pytest.approx(CLOSE - 0.1)
    assert made.chunk_s("p", 7, 5.1) == 0.0, "together they are too many tokens for one pass"
    assert made.chunk_s("q", 8, 5.1) == 0.0, "it is its own"
    assert made.chunk_s("p", 8, 5.0 + CLOSE) == 0.0, "it should have been here"


def test_no_step_stands_between_two_chunks_of_a_prompt() -> None:
    """p's step comes when q's first chunk has been computed, and the second one comes after it."""
    line = Line(oracles(1), "pq")
    worker = line.workers[0]
    worker._rhythm.ran(1, 8.0)
    first, second = step("q", 0, [(2, 0, [6, 7])], samples=False), step("q", 1, [(2, 2, [8])])

    async def chunks() -> float:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        loop.call_later(0.02, worker.put, P)
        loop.call_later(0.06, worker.put, second)
        await line.run([first], 3)
        return time.monotonic() - began

    try:
        assert asyncio.run(chunks()) < 2.0
    finally:
        line.close()
    assert line.merged == [1]
