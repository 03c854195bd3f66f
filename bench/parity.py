"""Erasure codes against Intel ISA-L: bytes of data coded in a second of processor time, on one thread.

Both sides code the same shards, in turns, each into outputs of its own; results are compared before anything is
measured. What a call costs without any bytes is subtracted on both sides: bindings are not what is compared. Decoding:
as many data shards as the code has parities. Time is the thread's processor time, since the machine may be shared.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bench.contract import Result, percentile, progress
from bench.peers.isal import Call, Isal, Shard, restoring_rows
from kernels.coding import _native
from kernels.coding.codes import make_code
from kernels.coding.field import generator

SHAPES = (("xor", 4, 1), ("xor", 8, 1), ("rdp", 8, 2), ("rs", 4, 2), ("rs", 8, 2), ("rs", 8, 3))
SIZES = {"64KB": 64 << 10, "4MB": 4 << 20}
CALL_BYTES = 16 << 20  # about so many are coded in one measurement


@dataclass(frozen=True)
class Contest:
    """One operation, in two ways."""

    name: str
    ours: Call  # of 1: all, of 0: nothing
    theirs: Call | None  # of so many bytes of each shard


def run(quick: bool) -> Result:
    rounds = 25 if quick else 101
    result = Result("parity", settings={"rounds": rounds, "quick": quick, "threads": 1, "sizes": SIZES})
    result.settings["level"] = ("C", "AVX2", "AVX-512", "GFNI")[_native.set_level(-1)]
    try:
        isal = Isal()
    except OSError as error:
        result.absent["isal"] = f"{error} (Debian: apt-get install libisal2)"
        isal = None
    for label, size in SIZES.items():
        for shape in SHAPES:
            for contest in _contests(*shape, size, isal):
                _measure(result, f"{contest.name}_{label}", contest, shape[1], size, rounds)
    return result


def _shards(count: int, size: int, fill: bool = False) -> list[Shard]:
    """Each begins at a multiple of 64 bytes, and two never at the same place of a page."""
    rng = np.random.default_rng(count)
    shards = []
    for i in range(count):
        room = np.zeros(size + 8192, np.uint8)
        begin = -room.ctypes.data % 4096 + 64 * (i * 5 % 64)
        shards.append(room[begin : begin + size])
        if fill:
            shards[-1][:] = rng.integers(0, 256, size, np.uint8)
    return shards


def _contests(name: str, data: int, parity: int, size: int, isal: Isal | None) -> list[Contest]:
    code, rows = make_code(name, data, parity), generator(data, parity)
    shards, label = _shards(data, size, fill=True), f"{name}_{data}_{parity}"
    ours, theirs = _shards(parity, code.parity_bytes(size)), _shards(parity, size)
    restored, their_restored = _shards(parity, size), _shards(parity, size)
    lost = [0, data // 2, data - 1][:parity]
    left = [shard for i, shard in enumerate(shards) if i not in lost]
    gaps = [restored[lost.index(i)] if i in lost else shard for i, shard in enumerate(shards)]
    their_encode = their_decode = None
    if isal is not None and name == "xor":
        their_encode, their_decode = (
            isal.xor(shards, theirs[0]),
            isal.xor([*left, theirs[0]], their_restored[0]),
        )
    elif isal is not None:
        their_encode = isal.dot(rows, shards, theirs)
        their_decode = isal.dot(restoring_rows(rows, lost), [*left, *theirs], their_restored)
    whole = code.positions(size)
    contests = [
        Contest("encode_" + label, lambda part: code.encode(shards, ours, 0, whole * part), their_encode),
        Contest("decode_" + label, lambda part: code.decode(gaps, ours, lost, 0, whole * part), their_decode),
    ]
    for contest in contests:
        contest.ours(1)
        if contest.theirs is not None:
            contest.theirs(size)
    answers = [shards[i] for i in lost]
    _same(label, restored, answers)
    if isal is not None:
        _same(label, their_restored, answers)
        _same(label, ours if name != "rdp" else theirs, theirs)
    return contests


def _same(label: str, found: list[Shard], expected: list[Shard]) -> None:
    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise AssertionError(f"{label}: the results differ")


def _measure(result: Result, name: str, contest: Contest, data: int, size: int, rounds: int) -> None:
    calls = max(1, CALL_BYTES // (data * size))
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):  # alternating: the machine's mood is the same for both
        ours.append(data * size / _seconds(contest.ours, 1, calls))
        if contest.theirs is not None:
            theirs.append(data * size / _seconds(contest.theirs, size, calls))
    fast = result.measure(f"{name}_bytes_per_s", ours)
    if theirs:
        slow = result.measure(f"isal_{name}_bytes_per_s", theirs, "baseline")
        result.ratios[name] = fast / slow
        pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
        result.spread[f"ratios.{name}"] = (percentile(pairs, 0.25), percentile(pairs, 0.75))
        progress(f"  {name}: {fast / 1e9:.1f} GB/s, ISA-L {slow / 1e9:.1f}: {fast / slow:.2f}")


def _seconds(call: Call, amount: int, calls: int) -> float:
    """Of one call, without what one of nothing takes."""
    times = []
    for much in (amount, 0):
        begun = time.thread_time()
        for _ in range(calls):
            call(much)
        times.append(time.thread_time() - begun)
    return (times[0] - times[1]) / calls
