"""Which chunks of a request have parity where, and what can be rebuilt after a loss (GhostServe, arXiv 2605.00831).

A chunk is a fixed number of positions of one request; its shards are their KV on the stages of the pipeline. Its
encoder is a node outside the pipeline, the next one for each next chunk. What an encoder acknowledged is all that
counts: a chunk of which it has some shards protects nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from controlplane.contract.ids import Member


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Positions [index, index + 1) x the chunk's length of a request. `version` grows whenever one of them is computed
    again: shards of two versions do not belong together."""

    rid: int
    index: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """Every stage is to offer its shard of the chunk to the encoder."""

    chunk: Chunk
    encoder: Member


def encoder_of(rid: int, index: int, outside: Collection[Member]) -> Member | None:
    """The encoder rotates chunk by chunk over the nodes outside the pipeline; requests begin at different ones. None:
    there is no such node."""
    nodes = sorted(outside)
    return nodes[(rid + index) % len(nodes)] if nodes else None


@dataclass(slots=True)
class _Entry:
    version: int
    encoder: Member
    acknowledged: bool = False
    refused: bool = False


class ParityLedger:
    """The account of one pipeline's requests, kept by its scheduler."""

    def __init__(self, stages: Sequence[Member], parity: int, chunk_tokens: int) -> None:
        self._stages = tuple(stages)
        self._parity = parity  # K: so many stages may be lost
        self._chunk_tokens = chunk_tokens
        self._versions: dict[int, int] = {}
        self._chunks: dict[int, dict[int, _Entry]] = {}  # by request and index

    def grew(self, rid: int, tokens: int, nodes: Collection[Member]) -> list[Order]:
        """KV of the request is valid on all stages up to `tokens`, and these nodes are there: what to encode now. A
        chunk is ordered once, and again only if its encoder is gone."""
        outside = set(nodes) - set(self._stages)
        chunks, orders = self._chunks.setdefault(rid, {}), []
        for index in range(tokens // self._chunk_tokens):
            entry = chunks.pop(index, None)
            if entry is None or entry.encoder not in outside:
                encoder = encoder_of(rid, index, outside)
                if encoder is None:
                    continue
                entry = _Entry(self._versions.get(rid, 0), encoder)
                orders.append(Order(Chunk(rid, index, entry.version), encoder))
            chunks[index] = entry
        return orders

    def rewrote(self, rid: int, start: int) -> None:
        """Positions from `start` on are computed again: no shard or parity of them is of any use."""
        self._versions[rid] = self._versions.get(rid, 0) + 1
        kept = self._chunks.get(rid, {}).items()
        self._chunks[rid] = {
            index: entry for index, entry in kept if (index + 1) * self._chunk_tokens <= start
        }

    def freed(self, rid: int) -> None:
        self._chunks.pop(rid, None)
        self._versions.pop(rid, None)

    def acknowledged(self, chunk: Chunk, encoder: Member) -> None:
        """The encoder has parity over all shards of the chunk."""
        entry = self._entry(chunk, encoder)
        if entry is not None:
            entry.acknowledged, entry.refused = True, False

    def refused(self, chunk: Chunk, encoder: Member) -> None:
        """The encoder will not have the chunk, or no longer has it. Nothing more is done about it until `room`."""
        entry = self._entry(chunk, encoder)
        if entry is not None:
            entry.acknowledged, entry.refused = False, True

    def room(self, encoder: Member) -> list[Order]:
        """The encoder has room again: what it refused is ordered again."""
        orders = []
        for rid, chunks in self._chunks.items():
            for index, entry in chunks.items():
                if entry.refused and entry.encoder == encoder:
                    entry.refused = False
                    orders.append(Order(Chunk(rid, index, entry.version), encoder))
        return orders

    def lag_chunks(self, rid: int, tokens: int) -> int:
        """Whole chunks up to `tokens` that have no parity."""
        whole, chunks = tokens // self._chunk_tokens, self._chunks.get(rid, {})
        return whole - sum(entry.acknowledged for index, entry in chunks.items() if index < whole)

    def rebuildable(self, rid: int, lost: Collection[Member]) -> list[tuple[int, int]]:
        """Extents of positions whose KV on the lost stages can be had from the stages and encoders that are left:
        none if more stages are lost than there are parities."""
        if sum(stage in lost for stage in self._stages) > self._parity:
            return []
        extents: list[tuple[int, int]] = []
        for index, entry in sorted(self._chunks.get(rid, {}).items()):
            if not entry.acknowledged or entry.encoder in lost:
                continue
            begin, end = index * self._chunk_tokens, (index + 1) * self._chunk_tokens
            if extents and extents[-1][1] == begin:
                begin = extents.pop()[0]
            extents.append((begin, end))
        return extents

    def _entry(self, chunk: Chunk, encoder: Member) -> _Entry | None:
        """None for an answer about an earlier version, or of an encoder that the chunk no longer has."""
        entry = self._chunks.get(chunk.rid, {}).get(chunk.index)
        if entry is None or entry.version != chunk.version or entry.encoder != encoder:
            return None
        return entry
