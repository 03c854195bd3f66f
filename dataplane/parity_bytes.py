"""The bytes of parities on one node, in host memory of their own. Every call is for the KV thread."""

from __future__ import annotations

from collections.abc import Sequence

from dataplane._fast.checksum import piece_sums
from dataplane.core.encoder import Add, Begin, Close, Effect, End, Key, Open, Solve, TakeOut, checked
from dataplane.core.messages import Shape
from kernels.coding.codes import Code

OF_BYTES = (Open, Add, Close, Begin, TakeOut, Solve, End)


class ParityBytes:
    def __init__(self) -> None:
        self.parities: dict[Key, list[bytearray]] = {}
        self.restored: dict[Key, dict[int, bytearray]] = {}  # worked out, by stage
        self._shapes: dict[Key, Shape] = {}
        self._copies: dict[Key, tuple[Shape, list[bytearray]]] = {}
        self._sizes: dict[Key, dict[int, int]] = {}  # bytes of shards, by stage
        self._lengths: dict[Key, dict[int, int]] = {}  # the same, of what is being restored

    def perform(self, effects: Sequence[Effect], payload: memoryview, size: int) -> dict[Key, dict[int, int]]:
        """In order. `payload`: shards of `size` bytes. Returns what was solved: the checksums of shards, by stage."""
        solved: dict[Key, dict[int, int]] = {}
        for effect in effects:
            match effect:
                case Open(key, shape):
                    each = self._code(shape).parity_bytes(shape.longest)
                    self._shapes[key], self._sizes[key] = shape, {}
                    self.parities[key] = [bytearray(each) for _ in range(shape.parities)]
                case Add(key, stage, place):
                    shard = payload[place * size : (place + 1) * size]
                    self._code(self._shapes[key]).update(self.parities[key], stage, shard)
                    self._sizes[key][stage] = size
                case Close(key):
                    del self.parities[key], self._shapes[key], self._sizes[key]
                case Begin(key):
                    self._copies[key] = self._shapes[key], [bytearray(part) for part in self.parities[key]]
                    self._lengths[key], self.restored[key] = self._sizes[key], {}
                case TakeOut(key, stage, place):
                    shape, copy = self._copies[key]
                    self._code(shape).update(copy, stage, payload[place * size : (place + 1) * size])
                case Solve(key, lost):
                    solved[key] = self._solve(key, lost)
                case End(key):
                    del self._copies[key], self._lengths[key], self.restored[key]
        return solved

    def _solve(self, key: Key, lost: Sequence[int]) -> dict[int, int]:
        """Of the shards of all other stages nothing is left in the copy, so that they count as zeros."""
        shape, copy = self._copies[key]
        found = self.restored[key] = {stage: bytearray(self._lengths[key][stage]) for stage in lost}
        shards = [found.get(stage, b"") for stage in range(shape.shards)]
        self._code(shape).decode(shards, copy, lost)
        return {stage: int(piece_sums(found[stage], len(found[stage]))[0]) for stage in lost}

    def _code(self, shape: Shape) -> Code:
        code = checked(shape)
        assert code is not None, "the encoder opens no other"
        return code
