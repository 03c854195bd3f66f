"""What the ranks of a stage need before they go on in another layout: which KV is read from the shelf and which weights
from disk, by whom, and who sends whom what. The same plan takes a rank in.

Reading is what takes long (a host's link has a tenth of the bandwidth between ranks), so each thing is read once, by
whoever has read least so far, and then sent to those that need it. What a rank that stays has is never read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kernels.ranks.layout import DATA_PARALLEL, Layout

Plane = tuple[int, int]  # layer, head


@dataclass(frozen=True, slots=True)
class Held:
    """A request as the loss finds it. Blocks are counted from its first position."""

    request: int
    owner: int
    blocks: int  # that are computed, in every rank's planes
    on_shelf: int  # blocks of which the shelf has the planes of all ranks that are lost


@dataclass(frozen=True, slots=True)
class KvRead:
    """`reader` reads the first `blocks` blocks of these planes from the shelf. `target` is who needs them: itself, or a
    rank that it sends them to."""

    request: int
    planes: tuple[Plane, ...]
    blocks: int
    reader: int
    target: int


@dataclass(frozen=True, slots=True)
class KvSend:
    """Planes that a rank has which stays, and another one needs from now on."""

    request: int
    planes: tuple[Plane, ...]
    blocks: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class HeadRead:
    """Part `part` of `parts` of a head's attention weights, which no rank has that stays."""

    layer: int
    head: int
    part: int
    parts: int
    reader: int
    targets: tuple[int, ...]  # others that need it


@dataclass(frozen=True, slots=True)
class HeadSend:
    layer: int
    head: int
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardRead:
    """A shard of the FFN, which no rank has that stays. It has one place, so nobody else needs it."""

    layer: int
    shard: int
    reader: int


@dataclass(frozen=True, slots=True)
class ShardSend:
    layer: int
    shard: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: a block of one plane, the attention weights of a head in one layer, a shard of one layer's FFN."""

    block: int
    head: int
    shard: int


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second of one rank: from the host's memory or disk, and to or from other ranks, each way."""

    host: float
    peer: float


@dataclass(frozen=True, slots=True)
class Plan:
    """resume [request]: blocks that are there when all of this is done; what is behind them is computed again."""

    layout: Layout
    resume: dict[int, int]
    kv_reads: tuple[KvRead, ...]
    kv_sends: tuple[KvSend, ...]
    head_reads: tuple[HeadRead, ...]
    head_sends: tuple[HeadSend, ...]
    shard_reads: tuple[ShardRead, ...]
    shard_sends: tuple[ShardSend, ...]

    def read_bytes(self, sizes: Sizes) -> dict[int, float]:
        """What each rank reads."""
        read = dict.fromkeys(self.layout.ranks, 0.0)
        for kv in self.kv_reads:
            read[kv.reader] += kv.blocks * len(kv.planes) * sizes.block
        for head in self.head_reads:
            read[head.reader] += sizes.head / head.parts
        for shard in self.shard_reads:
            read[shard.reader] += sizes.shard
        return read

    def exchange_bytes(self, sizes: Sizes) -> dict[int, float]:
        """What each rank sends or receives, whichever is more."""
        out, into = dict.fromkeys(self.layout.ranks, 0.0), dict.fromkeys(self.layout.ranks, 0.0)

        def send(source: int, targets: Iterable[int], size: float) -> None:
            for target in targets:
                if target != source:
                    out[source] += size
                    into[target] += size

        for read in self.kv_reads:
            send(read.reader, (read.target,), read.blocks * len(read.planes) * sizes.block)
        for kv in self.kv_sends:
            send(kv.source, (kv.target,), kv.blocks * len(kv.planes) * sizes.block)
        for part in self.head_reads:
            send(part.reader, part.targets, sizes.head / part.parts)
        for head in self.head_sends:
            send(head.source, head.targets, sizes.head)
        for shard in self.shard_sends:
            send(shard.source, (shard.target,), sizes.shard)
        return {rank: max(out[rank], into[rank]) for rank in out}

    def seconds(self, sizes: Sizes, bandwidth: Bandwidth) -> float:
        """How long it takes: the rank that reads most, then the one that exchanges most."""
        read, exchanged = self.read_bytes(sizes), self.exchange_bytes(sizes)
        return max(read.values()) / bandwidth.host + max(exchanged.values()) / bandwidth.peer


def plan(
    before: Layout, after: Layout, requests: Sequence[Held], owners: Mapping[int, int], sizes: Sizes
) -> Plan:
    """From one layout to another, whose ranks may be fewer, more, or others. `owners`: of each request from now on.
    A rank that is in `before` and not in `after` is lost, with all that it had; one that returns with nothing has to be
    left out of a layout in between, or to have another identity. Raises ValueError for an owner that is no rank
    of `after`, or for a request without one."""
    stay = frozenset(before.ranks) & frozenset(after.ranks)
    if strangers := [held.request for held in requests if owners.get(held.request) not in after.ranks]:
        raise ValueError(f"requests {strangers[:8]} have no owner among ranks {after.ranks}")
    # Each rank's fair part of what is read is judged over all kinds together.
    read = dict.fromkeys(after.ranks, 0.0)
    shard_reads, shard_sends = _shards(before, after, stay)
    for shard in shard_reads:
        read[shard.reader] += sizes.shard
    head_reads, head_sends = _heads(before, after, stay)
    for head in head_reads:
        read[head.reader] += sizes.head / head.parts
    missing, kv_sends, resume = _planes(before, after, stay, requests, owners)
    kv_reads = _deal(missing, read, sizes.block)
    return Plan(
        after, resume, tuple(kv_reads), tuple(kv_sends), tuple(head_reads), tuple(head_sends), tuple(shard_reads),
        tuple(shard_sends),
    )  # fmt: skip


# ---------------------------------------------------------------------------------- weights


def _shards(before: Layout, after: Layout, stay: frozenset[int]) -> tuple[list[ShardRead], list[ShardSend]]:
    reads, sends = [], []
    for layer, (old, new) in enumerate(zip(before.shards, after.shards, strict=True)):
        for shard, (source, target) in enumerate(zip(old, new, strict=True)):
            if source == target:
                continue
            if source in stay:
                sends.append(ShardSend(layer, shard, source, target))
            else:
                reads.append(ShardRead(layer, shard, target))
    return reads, sends


def _heads(before: Layout, after: Layout, stay: frozenset[int]) -> tuple[list[HeadRead], list[HeadSend]]:
    """Weights of a head that is data-parallel are with every rank."""
    reads: list[HeadRead] = []
    sends: list[HeadSend] = []
    parts = len(after.ranks)
    sent = dict.fromkeys(sorted(stay), 0)
    for layer, (old, new) in enumerate(zip(before.heads, after.heads, strict=True)):
        for head, (source, target) in enumerate(zip(old, new, strict=True)):
            have = stay if source == DATA_PARALLEL else stay & {source}
            need = [rank for rank in after.ranks if target in (rank, DATA_PARALLEL) and rank not in have]
            if need and have:
                sender = min(sorted(have), key=sent.__getitem__)
                sent[sender] += len(need)
                sends.append(HeadSend(layer, head, sender, tuple(need)))
            elif need:
                reads += [
                    HeadRead(layer, head, part, parts, reader, tuple(rank for rank in need if rank != reader))
                    for part, reader in enumerate(after.ranks)
                ]
    return reads, sends


# ---------------------------------------------------------------------------------- KV


@dataclass(frozen=True, slots=True)
class _Missing:
    request: int
    target: int
    planes: tuple[Plane, ...]
    blocks: int


def _planes(
    before: Layout, after: Layout, stay: frozenset[int], requests: Sequence[Held], owners: Mapping[int, int]
) -> tuple[list[_Missing], list[KvSend], dict[int, int]]:
    """What is missing, who sends what is there, and where each request goes on."""
    # Source and target, either of them possibly DATA_PARALLEL.
    routes: dict[tuple[int, int], list[Plane]] = {}
    for layer, (old, new) in enumerate(zip(before.heads, after.heads, strict=True)):
        for head, route in enumerate(zip(old, new, strict=True)):
            routes.setdefault(route, []).append((layer, head))
    missing, sends, resume = [], [], {}
    for held in requests:
        moved: dict[tuple[int, int], list[Plane]] = {}
        for (source, target), planes in routes.items():
            here = held.owner if source == DATA_PARALLEL else source
            there = owners[held.request] if target == DATA_PARALLEL else target
            if here != there:
                moved.setdefault((here, there), []).extend(planes)
        lost = any(here not in stay for here, _ in moved)
        blocks = min(held.blocks, held.on_shelf) if lost else held.blocks
        resume[held.request] = blocks
        if not blocks:
            continue
        for (here, there), planes in moved.items():
            if here in stay:
                sends.append(KvSend(held.request, tuple(planes), blocks, here, there))
            else:
                missing.append(_Missing(held.request, there, tuple(planes), blocks))
    return missing, sends, resume


def _deal(missing: Iterable[_Missing], read: dict[int, float], block_bytes: int) -> list[KvRead]:
    """Who reads what: the rank that needs it, as long as it has not more than its part; then whoever has read least."""
    items = sorted(missing, key=lambda each: (-each.blocks, each.request, each.target))
    total = sum(read.values()) + sum(len(each.planes) * each.blocks for each in items) * block_bytes
    fair = total / len(read)
    reads: list[KvRead] = []
    left: list[_Missing] = []
    for each in items:
        plane_bytes = each.blocks * block_bytes
        own = min(len(each.planes), max(0, int((fair - read[each.target]) // plane_bytes)))
        read[each.target] += own * plane_bytes
        if own:
            reads.append(KvRead(each.request, each.planes[:own], each.blocks, each.target, each.target))
        if own < len(each.planes):
            left.append(_Missing(each.request, each.target, each.planes[own:], each.blocks))
    for each in left:
        mine: dict[int, list[Plane]] = {}
        for plane in each.planes:
            reader = min(read, key=lambda rank: (read[rank], rank != each.target, rank))
            read[reader] += each.blocks * block_bytes
            mine.setdefault(reader, []).append(plane)
        reads += [
            KvRead(each.request, tuple(planes), each.blocks, reader, each.target)
            for reader, planes in mine.items()
        ]
    return reads
