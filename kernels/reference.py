"""What every kernel must compute, in plain torch and float64 where it helps: the oracle of the kernel tests.

Slow and obvious. It makes no promise about bits."""

import torch

from kernels.base import PagedCache, StepArrays


def planes(kv: PagedCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K [blocks, kv_heads, head_dim, block_size] and V [blocks, kv_heads, block_size, head_dim], sharing memory."""
    array = torch.from_numpy(kv.array)
    if kv.dtype == "bfloat16":
        array = array.view(torch.bfloat16)
    k, v = array[:, layer, 0], array[:, layer, 1]
    return (
        k.view(kv.num_blocks, kv.kv_heads, kv.head_dim, kv.block_size),
        v.view(kv.num_blocks, kv.kv_heads, kv.block_size, kv.head_dim),
    )


def paged_attention(
    q: torch.Tensor,
    kv: PagedCache,
    layer: int,
    step: StepArrays,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """See kernels.paged_attention; computed in float64."""
    keys, values = planes(kv, layer)
    heads = q.shape[1]
    group = heads // kv.kv_heads
    for row, length in enumerate(step.context_lens.tolist()):
        begin, end = int(step.cu_q[row]), int(step.cu_q[row + 1])
        blocks = torch.from_numpy(step.tables[row, : -(-length // kv.block_size)].astype("int64"))
        k = keys[blocks].permute(1, 0, 3, 2).reshape(kv.kv_heads, -1, kv.head_dim)[:, :length].double()
        v = values[blocks].permute(1, 0, 2, 3).reshape(kv.kv_heads, -1, kv.head_dim)[:, :length].double()
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = torch.einsum("thd,hsd->hts", q[begin:end].double(), k) * scale
        query = torch.arange(length - (end - begin), length)[:, None]
        key = torch.arange(length)[None, :]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hts,hsd->thd", weights, v).to(out.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x**2) + eps) over the last dimension."""
    wide = x.double()
    return (weight.double() * wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second half."""
    gate, up = x.double().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim] rotated by cos, sin [T, head_dim / 2], the half-split form."""
    a, b = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
