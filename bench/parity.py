"""Erasure codes against Intel ISA-L: bytes of data coded in a second of processor time, on one thread each.

Both sides code the same shards, in turns, each into outputs of its own; results are compared before anything is
measured. Both are called with buffers that were looked up before, and what a call costs without any bytes is
subtracted: bindings are not what is compared. Time is the thread's processor time, since the machine may be shared.

`64KB` and `4MB` are one set of shards, coded again and again: out of the second-level cache, and out of what the last
one holds of it. With `_memory`, many sets are coded in turn, more than the caches hold: as shards are when they have
just arrived. Decoding: as many data shards as the code has parities. Updating: one shard is added to all parities.
`pq` is ISA-L's function for RAID 6, which has the parities of our Reed-Solomon code for K = 2 and, like that, no
tables.

On a processor with more than AVX2 all is measured a second time with what AVX2 has, on both sides. A ratio such as
`encode_rs42` is the geometric mean of the four cases; for XOR, of 4 and 8 shards, too. The single ones say where it
is less."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.contract import Result, percentile, progress
from bench.peers.isal import Call, Isal, Shard, restoring_rows
from kernels.coding import _native
from kernels.coding.codes import make_code, solution
from kernels.coding.field import generator

SHAPES = (("xor", 4, 1), ("xor", 8, 1), ("rdp", 8, 2), ("rs", 4, 2), ("rs", 8, 2), ("rs", 8, 3))
LEVELS = ("C", "AVX2", "AVX-512", "GFNI")
AVX2 = LEVELS.index("AVX2")
CALL_BYTES = 32 << 20  # about so many are coded in one measurement
MEMORY_BYTES = 192 << 20  # of shards, so that caches have none that will be needed soon


@dataclass(frozen=True)
class Case:
    label: str
    size: int  # of a shard
    memory: bool = False  # shards come from there

    def sets(self, shards: int) -> int:
        return MEMORY_BYTES // (shards * self.size) if self.memory else 1


CASES = (
    Case("64KB", 64 << 10),
    Case("4MB", 4 << 20),
    Case("64KB_memory", 64 << 10, memory=True),
    Case("4MB_memory", 4 << 20, memory=True),
)


class Turns:
    """The same operation on several sets of shards, one after the other. A call codes so many bytes of each shard."""

    def __init__(self, calls: Sequence[Call], first: int = 0) -> None:
        self._calls = calls
        self._next = first

    def seconds(self, size: int, count: int) -> float:
        """Of one call, without what one of nothing takes. The first one is not counted: it writes back what the other
        side left in the caches."""
        times = []
        for bytes_each in (size, 0):
            calls = [self._calls[(self._next + i) % len(self._calls)] for i in range(count + 1)]
            calls[0](bytes_each)
            begun = time.thread_time()
            for call in calls[1:]:
                call(bytes_each)
            times.append(time.thread_time() - begun)
        self._next += count + 1
        return (times[0] - times[1]) / count


@dataclass(frozen=True)
class Contest:
    """One operation, in two ways."""

    name: str
    ours: Turns
    theirs: Turns | None
    coded_bytes: int  # of data, by a call


class Ours:
    """The C functions, on these buffers."""

    def __init__(self, name: str, data: int, parity: int, size: int) -> None:
        self.rows = generator(data, parity)
        self._code = _native.Code(self.rows)
        self._rdp = name == "rdp"
        self.parity_bytes = make_code(name, data, parity).parity_bytes(size)

    def encode(self, shards: list[Shard], parity: list[Shard], stream: int) -> Call:
        held, out = _native.Shards(shards), _native.Shards(parity, range(len(parity)))
        if self._rdp:
            return self._in_rows(lambda width, end: _native.rdp_encode(held, out, width, 0, end, stream))
        return lambda size: self._code.encode(held, out, 0, size, stream)

    def update(self, parity: list[Shard], index: int, shard: Shard) -> Call:
        held, out = _native.Shards([shard]), _native.Shards(parity, range(len(parity)))
        if self._rdp:
            return self._in_rows(lambda width, end: _native.rdp_update(index, held, out, width, 0, end))
        return lambda size: self._code.update(index, held, out, 0, size)

    def decode(self, shards: list[Shard], parity: list[Shard], lost: tuple[int, ...], stream: int) -> Call:
        held, left = _native.Shards(shards, lost), _native.Shards(parity)
        if self._rdp:
            x, y = lost
            return self._in_rows(
                lambda width, end: _native.rdp_restore(x, y, held, left, width, 0, end, stream)
            )
        rows = tuple(range(len(lost)))
        inverse = solution(self.rows, lost, rows)
        return lambda size: self._code.restore(lost, rows, inverse, held, left, 0, size, stream)

    def _in_rows(self, call: Callable[[int, int], None]) -> Call:
        width = self.parity_bytes // _native.RDP_ROWS
        return lambda size: call(width, size // _native.RDP_ROWS)


def run(quick: bool) -> Result:
    rounds = 15 if quick else 51
    sizes = {case.label: case.size for case in CASES}
    result = Result("parity", settings={"rounds": rounds, "quick": quick, "threads": 1, "sizes": sizes})
    best = _native.set_level(-1)
    result.settings["level"] = LEVELS[best]
    for level in (best, AVX2) if best > AVX2 else (best,):
        suffix = "" if level == best else "_avx2"
        try:
            isal = Isal(avx2=level != best)
            result.settings["isal"] = isal.version
        except OSError as error:
            result.absent["isal"] = f"{error} (Debian: apt-get install libisal2)"
            isal = None
        _native.set_level(level)
        progress(f"{LEVELS[level]}:")
        for case in CASES:
            for shape in SHAPES:
                for contest in _contests(*shape, case, isal):
                    _measure(result, f"{contest.name}_{case.label}{suffix}", contest, case.size, rounds)
        _summarise(result, suffix)
    _native.set_level(-1)
    return result


def _summarise(result: Result, suffix: str) -> None:
    labels = [case.label + suffix for case in CASES]
    for name in ("xor", "rdp82", "rs42", "rs82", "rs83"):
        for what in ("encode", "decode"):
            found = [
                ratio
                for key, ratio in result.ratios.items()
                if key.startswith(f"{what}_{name}") and any(key.endswith(f"_{label}") for label in labels)
            ]
            if found:
                result.ratios[f"{what}_{name}{suffix}"] = statistics.geometric_mean(found)


def _shards(count: int, size: int, content: Sequence[Shard] = ()) -> list[Shard]:
    """Each begins at a multiple of 64 bytes, and two never at the same place of a page."""
    shards = []
    for i in range(count):
        room = np.zeros(size + 8192, np.uint8)
        begin = -room.ctypes.data % 4096 + 64 * (i * 5 % 64)
        shards.append(room[begin : begin + size])
        if content:
            shards[-1][:] = content[i]
    return shards


def _contests(name: str, data: int, parity: int, case: Case, isal: Isal | None) -> list[Contest]:
    """Every operation of a code, over the sets of the case."""
    rng = np.random.default_rng(data)
    content = [rng.integers(0, 256, case.size, np.uint8) for _ in range(data)]
    sets = [_calls(name, parity, case, content, isal) for _ in range(case.sets(data + parity))]
    contests = []
    for operation in sets[0]:
        pairs = [calls[operation] for calls in sets]
        theirs = [call for _, call in pairs if call is not None]
        coded = case.size if operation == "update" else data * case.size
        contest = Contest(
            f"{operation}_{name}{data}{parity}",
            Turns([call for call, _ in pairs]),
            Turns(theirs, len(theirs) // 2) if theirs else None,
            coded,
        )
        contests.append(contest)
    return contests


def _calls(
    name: str, parity: int, case: Case, content: Sequence[Shard], isal: Isal | None
) -> dict[str, tuple[Call, Call | None]]:
    """Ours and theirs of each operation on one new set of shards, after their results have been compared."""
    data, size = len(content), case.size
    mine, rows = Ours(name, data, parity, size), generator(data, parity)
    shards = _shards(data, size, content)
    ours, theirs = _shards(parity, mine.parity_bytes), _shards(parity, size)
    restored, their_restored = _shards(parity, size), _shards(parity, size)
    lost, stream = (0, data // 2, data - 1)[:parity], 1 if case.memory else -1
    left = [shard for i, shard in enumerate(shards) if i not in lost]
    gaps = [restored[lost.index(i)] if i in lost else shard for i, shard in enumerate(shards)]
    calls: dict[str, tuple[Call, Call | None]] = {}
    their_encode = their_decode = their_update = None
    if isal is not None:
        if name == "xor":
            their_encode = isal.xor(shards, theirs[0])
            their_decode = isal.xor([*left, theirs[0]], their_restored[0])
        else:
            their_encode = isal.dot(rows, shards, theirs)
            their_decode = isal.dot(restoring_rows(rows, lost), [*left, *theirs], their_restored)
        their_update = None if name == "rdp" else isal.update(rows, 1, shards[1], theirs)
    calls["encode"] = mine.encode(shards, ours, stream), their_encode
    calls["decode"] = mine.decode(gaps, ours, lost, stream), their_decode
    if isal is not None and (name, parity) == ("rs", 2):
        calls["pq"] = calls["encode"][0], isal.pq(shards, theirs)
    calls["update"] = mine.update(ours, 1, shards[1]), their_update  # the last one: it changes parities
    for our_call, their_call in calls.values():
        our_call(size)
        if their_call is not None:
            their_call(size)
            _same(name, ours if name != "rdp" else theirs, theirs)
    _same(name, restored, [shards[i] for i in lost])
    if isal is not None:
        _same(name, their_restored, [shards[i] for i in lost])
    return calls


def _same(label: str, found: list[Shard], expected: list[Shard]) -> None:
    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise AssertionError(f"{label}: the results differ")


def _measure(result: Result, name: str, contest: Contest, size: int, rounds: int) -> None:
    calls = max(3, CALL_BYTES // contest.coded_bytes)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):  # alternating: the machine's mood is the same for both
        ours.append(contest.coded_bytes / contest.ours.seconds(size, calls))
        if contest.theirs is not None:
            theirs.append(contest.coded_bytes / contest.theirs.seconds(size, calls))
    fast = result.measure(f"{name}_bytes_per_s", ours)
    if theirs:
        slow = result.measure(f"isal_{name}_bytes_per_s", theirs, "baseline")
        result.ratios[name] = fast / slow
        pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
        result.spread[f"ratios.{name}"] = (percentile(pairs, 0.25), percentile(pairs, 0.75))
        progress(f"  {name}: {fast / 1e9:.1f} GB/s, ISA-L {slow / 1e9:.1f}: {fast / slow:.2f}")
