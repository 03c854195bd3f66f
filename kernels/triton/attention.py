# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Causal attention over a paged cache, the same program for prefill chunks and for decode steps.

Keys are cut into splits of SPLIT_KEYS at fixed positions 0, SPLIT_KEYS, 2 SPLIT_KEYS ...; a split is worked through
in tiles of keys in order (online softmax, Dao et al., FlashAttention-2), each split by a program of its own, and a
second kernel merges a query's splits in order. So a long context keeps the whole GPU busy even for one row, and still
the sums are cut by absolute position alone: a query's bits depend on its keys only, not on the other queries, rows or
lengths of the step. Splits whose number depends on the batch, as library kernels use for decode, would break that.

A tile of queries has `rows` rows: as many queries of one sequence as fit, each with all heads of its group, which
share the keys. In decode one query leaves most rows of a tile empty. That costs matrix work, of which decode has plenty
to spare (memory bounds it), and it keeps the shape of every product the same as in prefill."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, ceil_div, check, dot, power_of_two

SPLIT_KEYS = 512
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How one model's attention is cut: rows (queries x group) and keys of a tile. Never depends on a step."""

    rows: int
    keys: int
    queries: int  # of one sequence in a tile
    warps: int
    stages: int


def attention_tiles(dtype: torch.dtype, head_dim: int, group: int) -> AttentionTiles:
    """Sizes that fit the shared memory of every GPU since Ampere (99 KB a program)."""
    if dtype is torch.bfloat16 and head_dim <= 128:
        rows, keys, warps, stages = 64, 64, 4, 2
    elif head_dim <= 128:
        rows, keys, warps, stages = 32, 32, 8, 1
    else:
        rows, keys, warps, stages = 16, 16, 4, 1
    rows = power_of_two(group, rows)
    return AttentionTiles(rows, keys, rows // group, warps, stages)


class Partials:
    """Room for unmerged splits, kept between steps: float32 for each query, head and split."""

    def __init__(self, queries: int, splits: int, heads: int, head_dim: int, device: torch.device) -> None:
        self._entries = queries * splits
        self.acc = torch.empty(self._entries * heads * head_dim, dtype=torch.float32, device=device)
        self.peak_sum = torch.empty(self._entries * heads * 2, dtype=torch.float32, device=device)

    def queries(self, splits: int) -> int:
        """How many queries there is room for, at so many splits each."""
        return self._entries // splits


@triton.jit(do_not_specialize=["tile0", "query0", "width", "splits"])
def _attend(
    q,
    keys,
    values,
    positions,
    tables,
    tiles,
    acc_out,
    peak_sum_out,
    tile0,
    query0,
    width,
    splits,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tile = tiles + (tile0 + tl.program_id(0)) * 3
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(tile)
    first = tl.load(tile + 1)
    end = tl.minimum(tl.load(tile + 2), first + ROWS // GROUP)
    if first >= end:
        return  # a row that only pads the batch
    begin = split * SPLIT
    if WINDOW > 0:
        begin = tl.maximum(begin, (tl.load(positions + first) - WINDOW + 1) // KEYS * KEYS)
    stop = tl.minimum(split * SPLIT + SPLIT, tl.load(positions + end - 1) + 1)
    if begin >= stop:
        return  # no query of the tile has keys here, and none will merge this split

    lane = tl.arange(0, ROWS)
    query = first + lane // GROUP
    live = query < end
    head = kv_head * GROUP + lane % GROUP
    dim = tl.arange(0, DIM)
    inner = dim < HEAD_DIM
    position = tl.load(positions + query, mask=live, other=-1)
    q_at = (query.to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
    q_tile = tl.load(q + q_at[:, None] + dim[None, :], mask=live[:, None] & inner[None, :], other=0.0)

    acc = tl.zeros((ROWS, DIM), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(begin, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < stop
        block = tl.load(tables + row * width + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = ((block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        where = at[:, None] + dim[None, :]
        mask = inside[:, None] & inner[None, :]
        k_tile = tl.load(keys + where, mask=mask, other=0.0)
        scores = dot(q_tile, tl.trans(k_tile), tl.zeros((ROWS, KEYS), tl.float32)) * SCALE
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen yet: 0, not NaN
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 1)
        v_tile = tl.load(values + where, mask=mask, other=0.0)
        acc = dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None])
        peak = new_peak

    out = ((query - query0).to(tl.int64) * (KV_HEADS * GROUP) + head) * splits + split
    tl.store(acc_out + out[:, None] * HEAD_DIM + dim[None, :], acc, mask=live[:, None] & inner[None, :])
    tl.store(peak_sum_out + out * 2, peak, mask=live)
    tl.store(peak_sum_out + out * 2 + 1, total, mask=live)


@triton.jit(do_not_specialize=["query0", "splits"])
def _merge(
    acc_in,
    peak_sum_in,
    positions,
    out,
    query0,
    splits,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    query = query0 + tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(positions + query)  # -1 where a row only pads the batch: it has no splits
    low = 0
    if WINDOW > 0:
        low = tl.maximum(0, position - WINDOW + 1) // SPLIT
    dim = tl.arange(0, DIM)
    inner = dim < HEAD_DIM
    acc = tl.zeros((DIM,), tl.float32)
    peak = float("-inf")
    total = 0.0
    at = (tl.program_id(0).to(tl.int64) * HEADS + head) * splits
    for split in tl.range(low, (position + SPLIT) // SPLIT):
        other_peak = tl.load(peak_sum_in + (at + split) * 2)
        other_total = tl.load(peak_sum_in + (at + split) * 2 + 1)
        other = tl.load(acc_in + (at + split) * HEAD_DIM + dim, mask=inner, other=0.0)
        new_peak = tl.maximum(peak, other_peak)
        fade, gain = tl.exp2(peak - new_peak), tl.exp2(other_peak - new_peak)
        total = total * fade + other_total * gain
        acc = acc * fade + other * gain
        peak = new_peak
    acc = acc / tl.where(total > 0.0, total, 1.0)
    out_at = (query.to(tl.int64) * HEADS + head) * HEAD_DIM + dim
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=inner)


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    slabs: list[tuple[int, int, int, int]],
    partials: Partials,
    splits: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """out = softmax(scale q K) V, causal, over the last `window` keys if given. q, out: [>=T, heads * head_dim].

    keys, values: one layer's [num_blocks, block_size, kv_heads, head_dim]. int32: positions [T] (-1: no query),
    tables [B, W] of blocks, tiles [N, 3] of (row of tables, first query, end of that row's queries). slabs: ranges
    (first tile, last, first query, last) that fit in `partials` one after another; `splits` covers every position."""
    _, block_size, kv_heads, head_dim = keys.shape
    if q.shape[1] % (kv_heads * head_dim) or q.shape != out.shape:
        raise ValueError("q, out and the cache have different head sizes")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys is empty")
    check(len(positions), keys.dtype, q, out)
    heads = q.shape[1] // head_dim
    sizes = attention_tiles(keys.dtype, head_dim, heads // kv_heads)
    dim = power_of_two(head_dim, 16)
    for tile0, tile1, query0, query1 in slabs:
        if query1 - query0 > partials.queries(splits):
            raise ValueError("a slab does not fit in the room for partial results")
        _attend[(tile1 - tile0, kv_heads, splits)](
            q, keys, values, positions, tables, tiles, partials.acc, partials.peak_sum,
            tile0, query0, tables.shape[1], splits,
            SCALE=scale * LOG2_E, WINDOW=window or 0, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
            HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=block_size,
            ROWS=sizes.rows, KEYS=sizes.keys, SPLIT=SPLIT_KEYS,
            num_warps=sizes.warps, num_stages=sizes.stages, **OPTIONS,
        )  # fmt: skip
        _merge[(query1 - query0, heads)](
            partials.acc, partials.peak_sum, positions, out, query0, splits,
            WINDOW=window or 0, HEADS=heads, HEAD_DIM=head_dim, DIM=dim, SPLIT=SPLIT_KEYS,
            num_warps=1 if dim <= 128 else 4, **OPTIONS,
        )  # fmt: skip


def splits_of(positions: int) -> int:
    """How many splits the positions 0 .. positions - 1 fall into."""
    return ceil_div(positions, SPLIT_KEYS)


def keys_of(splits: int) -> int:
    """How many keys so many splits have."""
    return splits * SPLIT_KEYS
