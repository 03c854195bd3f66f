# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Splits merged QKV, norms heads, rotates, and writes keys and values into their blocks: one pass over a step."""

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, check, power_of_two


@triton.jit
def _normed(a, b, weight, at, inside, HALF: tl.constexpr, EPS: tl.constexpr):
    """Both halves of a head, divided by its root mean square and weighted."""
    scale = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPS)
    first = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(weight + HALF + at, mask=inside, other=0.0).to(tl.float32)
    return a * scale * first, b * scale * second


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
    EPS: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return  # a row that only pads the batch writes nowhere
    at = tl.arange(0, WIDTH)
    inside = at < HALF
    source = qkv + (token.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + at
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + HALF, mask=inside, other=0.0)
    if head >= HEADS + KV_HEADS:
        target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + at
        tl.store(target, a, mask=inside)
        tl.store(target + HALF, b, mask=inside)
        return
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        if head < HEADS:
            wide_a, wide_b = _normed(wide_a, wide_b, q_norm, at, inside, HALF, EPS)
        else:
            wide_a, wide_b = _normed(wide_a, wide_b, k_norm, at, inside, HALF, EPS)
    angle = tl.load(positions + token).to(tl.int64) * HALF + at
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if head < HEADS:
        target = q + (token.to(tl.int64) * HEADS + head) * (2 * HALF) + at
    else:
        target = keys + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + at
    tl.store(target, (wide_a * c - wide_b * s).to(a.dtype), mask=inside)
    tl.store(target + HALF, (wide_b * c + wide_a * s).to(a.dtype), mask=inside)


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
    by row positions[t] of cos and sin (float32 [positions, head_dim / 2], half-split form); the queries go to q
    [>=T, heads * head_dim], keys and values to slot slots[t] = block * block_size + offset of one layer's
    [num_blocks, block_size, kv_heads, head_dim], nowhere if it is negative. positions, slots: int32."""
    _, _, kv_heads, head_dim = keys.shape
    heads = q.shape[1] // head_dim
    check(len(positions), keys.dtype, qkv, q)
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim or cos.shape[1] * 2 != head_dim:
        raise ValueError("qkv, q, the cache and the rotary table have different head sizes")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("norm both q and k or neither")
    _rope_write[(len(positions), heads + 2 * kv_heads)](
        qkv, positions, slots, cos, sin,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        q, keys, values,
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, WIDTH=power_of_two(head_dim // 2), EPS=eps,
        NORM=q_norm is not None, num_warps=1, **OPTIONS,
    )  # fmt: skip
