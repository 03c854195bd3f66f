# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Splits merged QKV, norms heads, rotates, and writes keys and values into their blocks: one pass over a step."""

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, check, power_of_two


@triton.jit
def _normed(a, b, rest, weight, at, inside, HALF: tl.constexpr, TAIL: tl.constexpr, TAIL_WIDTH: tl.constexpr,
            EPS: tl.constexpr):  # fmt: skip
    """The parts of a head, divided by its root mean square and weighted."""
    squares = tl.sum(a * a, 0) + tl.sum(b * b, 0)
    if TAIL > 0:
        squares += tl.sum(rest * rest, 0)
    scale = 1.0 / tl.sqrt(squares / (2 * HALF + TAIL) + EPS)
    first = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(weight + HALF + at, mask=inside, other=0.0).to(tl.float32)
    if TAIL > 0:
        last = tl.arange(0, TAIL_WIDTH)
        rest = rest * scale * tl.load(weight + 2 * HALF + last, mask=last < TAIL, other=0.0).to(tl.float32)
    return a * scale * first, b * scale * second, rest


@triton.jit
def _rope_write(
    qkv,
    positions,
    slots,
    cos,
    sin,
    q_norm,
    k_norm,
    q,
    keys,
    values,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return  # a row that only pads the batch writes nowhere
    # Two halves that are rotated, and a tail that is not.
    at = tl.arange(0, WIDTH)
    inside = at < HALF
    last = tl.arange(0, TAIL_WIDTH)
    beyond = last < TAIL
    HEAD_DIM: tl.constexpr = 2 * HALF + TAIL
    source = qkv + (token.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM
    a = tl.load(source + at, mask=inside, other=0.0)
    b = tl.load(source + HALF + at, mask=inside, other=0.0)
    rest = tl.zeros((TAIL_WIDTH,), a.dtype)
    if TAIL > 0:
        rest = tl.load(source + 2 * HALF + last, mask=beyond, other=0.0)
    if head >= HEADS + KV_HEADS:
        target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM
        tl.store(target + at, a, mask=inside)
        tl.store(target + HALF + at, b, mask=inside)
        if TAIL > 0:
            tl.store(target + 2 * HALF + last, rest, mask=beyond)
        return
    wide_a, wide_b, wide_rest = a.to(tl.float32), b.to(tl.float32), rest.to(tl.float32)
    if NORM:
        if head < HEADS:
            wide_a, wide_b, wide_rest = _normed(
                wide_a, wide_b, wide_rest, q_norm, at, inside, HALF, TAIL, TAIL_WIDTH, EPS
            )
        else:
            wide_a, wide_b, wide_rest = _normed(
                wide_a, wide_b, wide_rest, k_norm, at, inside, HALF, TAIL, TAIL_WIDTH, EPS
            )
    angle = tl.load(positions + token).to(tl.int64) * HALF + at
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if head < HEADS:
        target = q + (token.to(tl.int64) * HEADS + head) * HEAD_DIM
    else:
        target = keys + (slot * KV_HEADS + head - HEADS) * HEAD_DIM
    tl.store(target + at, (wide_a * c - wide_b * s).to(a.dtype), mask=inside)
    tl.store(target + HALF + at, (wide_b * c + wide_a * s).to(a.dtype), mask=inside)
    if TAIL > 0:
        tl.store(target + 2 * HALF + last, wide_rest.to(a.dtype), mask=beyond)


def rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """For each of T = len(positions) tokens: norms q and k per head (weights [head_dim], both or none), rotates them
    by row positions[t] of cos and sin (float32 [positions, rotated / 2], half-split form: the first `rotated` values of
    a head are rotated, the others stay as they are); the queries go to q
    [>=T, heads * head_dim], keys and values to slot slots[t] = block * block_size + offset of one layer's
    [num_blocks, block_size, kv_heads, head_dim], nowhere if it is negative. positions, slots: int32."""
    _, _, kv_heads, head_dim = keys.shape
    heads = q.shape[1] // head_dim
    check(len(positions), keys.dtype, qkv, q)
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim or cos.shape[1] * 2 > head_dim:
        raise ValueError("qkv, q, the cache and the rotary table have different head sizes")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("norm both q and k or neither")
    half = cos.shape[1]
    tail = head_dim - 2 * half
    _rope_write[(len(positions), heads + 2 * kv_heads)](
        qkv, positions, slots, cos, sin,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        q, keys, values,
        HEADS=heads, KV_HEADS=kv_heads, HALF=half, WIDTH=power_of_two(half), TAIL=tail,
        TAIL_WIDTH=power_of_two(max(tail, 1)), EPS=eps, NORM=q_norm is not None, num_warps=1, **OPTIONS,
    )  # fmt: skip
