"""Erasure codes against Intel ISA-L: bytes of data coded in a second of processor time, on one thread each.

Both sides code the same shards, in turns, each into outputs of its own; results are compared before anything is
measured. Both are called with buffers that were looked up before, and what a call costs without any bytes is
subtracted: bindings are not what is compared. Time is the thread's processor time, since the machine may be shared.

Decoding: as many data shards as the code has parities. Updating: one shard is added to all parities. `pq` is ISA-L's
function for RAID 6, which has the same two parities as our Reed-Solomon code and, like that, no tables.

A ratio such as `encode_rs42` is the least of its sizes; for XOR, of 4 and 8 shards, too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.contract import Result, percentile, progress
from bench.peers.isal import Call, Isal, Shard, restoring_rows
from kernels.coding import _native
from kernels.coding.codes import make_code, solution
from kernels.coding.field import generator

SHAPES = (("xor", 4, 1), ("xor", 8, 1), ("rdp", 8, 2), ("rs", 4, 2), ("rs", 8, 2), ("rs", 8, 3))
SIZES = {"64KB": 64 << 10, "4MB": 4 << 20}
LEVELS = ("C", "AVX2", "AVX-512", "GFNI")
CALL_BYTES = 32 << 20  # about so many are coded in one measurement


@dataclass(frozen=True)
class Contest:
    """One operation, in two ways; a call codes so many bytes of each shard."""

    name: str
    ours: Call
    theirs: Call | None
    coded_bytes: int  # of data, by a call for all


class Ours:
    """The C functions, on these buffers."""

    def __init__(self, name: str, data: int, parity: int, size: int) -> None:
        self.rows = generator(data, parity)
        self._code = _native.Code(self.rows)
        self._rdp = name == "rdp"
        self.parity_bytes = make_code(name, data, parity).parity_bytes(size)

    def encode(self, shards: list[Shard], parity: list[Shard]) -> Call:
        held, out = _native.Shards(shards), _native.Shards(parity, range(len(parity)))
        if self._rdp:
            return self._in_rows(lambda width, end: _native.rdp_encode(held, out, width, 0, end))
        return lambda size: self._code.encode(held, out, 0, size)

    def update(self, parity: list[Shard], index: int, shard: Shard) -> Call:
        held, out = _native.Shards([shard]), _native.Shards(parity, range(len(parity)))
        if self._rdp:
            return self._in_rows(lambda width, end: _native.rdp_update(index, held, out, width, 0, end))
        return lambda size: self._code.update(index, held, out, 0, size)

    def decode(self, shards: list[Shard], parity: list[Shard], lost: tuple[int, ...]) -> Call:
        held, left = _native.Shards(shards, lost), _native.Shards(parity)
        if self._rdp:
            x, y = lost
            return self._in_rows(lambda width, end: _native.rdp_restore(x, y, held, left, width, 0, end))
        rows = tuple(range(len(lost)))
        inverse = solution(self.rows, lost, rows)
        return lambda size: self._code.restore(lost, rows, inverse, held, left, 0, size)

    def _in_rows(self, call: Callable[[int, int], None]) -> Call:
        width = self.parity_bytes // _native.RDP_ROWS
        return lambda size: call(width, size // _native.RDP_ROWS)


def run(quick: bool) -> Result:
    rounds = 25 if quick else 101
    result = Result("parity", settings={"rounds": rounds, "quick": quick, "threads": 1, "sizes": SIZES})
    result.settings["level"] = LEVELS[_native.set_level(-1)]
    try:
        isal = Isal()
        result.settings["isal"] = isal.version
    except OSError as error:
        result.absent["isal"] = f"{error} (Debian: apt-get install libisal2)"
        isal = None
    for label, size in SIZES.items():
        for shape in SHAPES:
            for contest in _contests(*shape, size, isal):
                _measure(result, f"{contest.name}_{label}", contest, size, rounds)
    for name in ("xor", "rdp82", "rs42", "rs82", "rs83"):
        for what in ("encode", "decode"):
            found = [ratio for key, ratio in result.ratios.items() if key.startswith(f"{what}_{name}")]
            if found:
                result.ratios[f"{what}_{name}"] = min(found)
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
    mine, label = Ours(name, data, parity, size), f"{name}{data}{parity}"
    shards, rows = _shards(data, size, fill=True), mine.rows
    ours, theirs = _shards(parity, mine.parity_bytes), _shards(parity, size)
    restored, their_restored = _shards(parity, size), _shards(parity, size)
    lost = (0, data // 2, data - 1)[:parity]
    left = [shard for i, shard in enumerate(shards) if i not in lost]
    gaps = [restored[lost.index(i)] if i in lost else shard for i, shard in enumerate(shards)]
    their_encode = their_decode = their_update = None
    if isal is not None and name == "xor":
        their_encode = isal.xor(shards, theirs[0])
        their_decode = isal.xor([*left, theirs[0]], their_restored[0])
    elif isal is not None:
        their_encode = isal.dot(rows, shards, theirs)
        their_decode = isal.dot(restoring_rows(rows, lost), [*left, *theirs], their_restored)
    if isal is not None and name != "rdp":
        their_update = isal.update(rows, 1, shards[1], theirs)
    whole = data * size
    contests = [
        Contest("encode_" + label, mine.encode(shards, ours), their_encode, whole),
        Contest("decode_" + label, mine.decode(gaps, ours, lost), their_decode, whole),
        Contest("update_" + label, mine.update(ours, 1, shards[1]), their_update, size),
    ]
    if isal is not None and (name, parity) == ("rs", 2):
        contests.append(Contest(f"pq_{label}", contests[0].ours, isal.pq(shards, theirs), whole))
    for contest in [*contests[:2], *contests[3:]]:  # an update changes what the others are compared by
        contest.ours(size)
        if contest.theirs is not None:
            contest.theirs(size)
    answers = [shards[i] for i in lost]
    _same(label, restored, answers)
    if isal is not None:
        _same(label, their_restored, answers)
        _same(label, ours if name != "rdp" else theirs, theirs)
    if their_update is not None:
        contests[2].ours(size)
        their_update(size)
        _same(label, ours, theirs)
    return contests


def _same(label: str, found: list[Shard], expected: list[Shard]) -> None:
    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise AssertionError(f"{label}: the results differ")


def _measure(result: Result, name: str, contest: Contest, size: int, rounds: int) -> None:
    calls = max(1, CALL_BYTES // contest.coded_bytes)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):  # alternating: the machine's mood is the same for both
        ours.append(contest.coded_bytes / _seconds(contest.ours, size, calls))
        if contest.theirs is not None:
            theirs.append(contest.coded_bytes / _seconds(contest.theirs, size, calls))
    fast = result.measure(f"{name}_bytes_per_s", ours)
    if theirs:
        slow = result.measure(f"isal_{name}_bytes_per_s", theirs, "baseline")
        result.ratios[name] = fast / slow
        pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
        result.spread[f"ratios.{name}"] = (percentile(pairs, 0.25), percentile(pairs, 0.75))
        progress(f"  {name}: {fast / 1e9:.1f} GB/s, ISA-L {slow / 1e9:.1f}: {fast / slow:.2f}")


def _seconds(call: Call, size: int, calls: int) -> float:
    """Of one call, without what one of nothing takes."""
    times = []
    for bytes_each in (size, 0):
        begun = time.thread_time()
        for _ in range(calls):
            call(bytes_each)
        times.append(time.thread_time() - begun)
    return (times[0] - times[1]) / calls
