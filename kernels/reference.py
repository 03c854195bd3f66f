"""What every kernel must compute, in plain torch and float64 where it helps: the oracle of the kernel tests.

Slow and obvious. It makes no promise about bits."""

import torch

from kernels.base import Experts, PagedCache, StepArrays


def planes(kv: PagedCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K [blocks, kv_heads, head_dim, block_size] and V [blocks, kv_heads, block_size, head_dim] of a CPU cache."""
    array = torch.from_numpy(kv.array)
    if kv.dtype == "bfloat16":
        array = array.view(torch.bfloat16)
    k, v = array[:, layer, 0], array[:, layer, 1]
    group = 2 if kv.dtype == "bfloat16" else 1  # inputs that are side by side, see kernels.h
    k = k.reshape(kv.num_blocks, kv.kv_heads, kv.head_dim // group, kv.block_size, group)
    return (
        k.transpose(3, 4).reshape(kv.num_blocks, kv.kv_heads, kv.head_dim, kv.block_size),
        v.reshape(kv.num_blocks, kv.kv_heads, kv.block_size, kv.head_dim),
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
    by_position = keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)
    attend(q, *by_position, step, scale, window, out)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: StepArrays,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Causal attention in float64. q, out [T, heads, head_dim]; keys, values [blocks, block_size, kv_heads,
    head_dim]."""
    _, block_size, kv_heads, _ = keys.shape
    group = q.shape[1] // kv_heads
    for row, length in enumerate(step.context_lens.tolist()):
        begin, end = int(step.cu_q[row]), int(step.cu_q[row + 1])
        blocks = torch.from_numpy(step.tables[row, : -(-length // block_size)].astype("int64")).to(q.device)
        k, v = (t[blocks].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for t in (keys, values))
        scores = torch.einsum("thd,shd->hts", q[begin:end].double(), k) * scale
        query = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None, :]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hts,shd->thd", weights, v).to(out.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """float64 [rows, n] = x [rows, k] weight [n, k]^T + bias [n]."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x**2) + eps) over the last dimension."""
    wide = x.double()
    return (weight.double() * wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def gelu_mul(x: torch.Tensor) -> torch.Tensor:
    """gelu, in the form with tanh, of the first half times the second half."""
    gate, up = x.double().chunk(2, -1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(x.dtype)


def experts(x: torch.Tensor, mixture: Experts) -> torch.Tensor:
    """float64 [rows, hidden] of x [rows, hidden]; no biases."""
    wide = x.double()
    probabilities = (wide @ mixture.router.double().T).softmax(-1)
    weights, chosen = probabilities.topk(mixture.chosen, -1)
    if mixture.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(wide)
    for row, (mine, those) in enumerate(zip(weights, chosen, strict=True)):
        for weight, expert in zip(mine, those.tolist(), strict=True):
            mlp = mixture.experts[expert]
            gate, up = linear(wide[row : row + 1], mlp.gate_up.dense(torch.float64), None).chunk(2, -1)
            hidden = gate * torch.sigmoid(gate) * up
            out[row] += weight * linear(hidden, mlp.down.dense(torch.float64), None)[0]
    return out


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second half."""
    gate, up = x.double().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim], its first values rotated by cos, sin [T, rotated / 2], the half-split form."""
    rotated = 2 * cos.shape[1]
    a, b = x[..., :rotated].double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), x[..., rotated:]], -1)
