"""What a kernel back end does, and what it may expect from a KV cache and a step.

The data plane's KVCache and StepArrays satisfy these protocols; kernels never import the data plane."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

PANEL = 16  # outputs in one panel of a packed weight


class PagedCache(Protocol):
    """The KV cache of one stage, laid out as dataplane/kvcache.py says."""

    num_blocks: int
    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    device: str

    @property
    def dtype(self) -> str: ...  # "float32" | "bfloat16"
    @property
    def address(self) -> int: ...
    @property
    def array(self) -> npt.NDArray[Any]: ...


class StepArrays(Protocol):
    """B rows with T tokens in all; row i's queries cu_q[i]:cu_q[i+1] are the last of its context_lens[i] keys."""

    @property
    def positions(self) -> npt.NDArray[np.int64]: ...  # [T]
    @property
    def slots(self) -> npt.NDArray[np.int64]: ...  # [T] block * block_size + offset
    @property
    def cu_q(self) -> npt.NDArray[np.int32]: ...  # [B + 1]
    @property
    def context_lens(self) -> npt.NDArray[np.int32]: ...  # [B]
    @property
    def tables(self) -> npt.NDArray[np.int32]: ...  # [B, W]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [n, k] as [ceil(n / 16), k, 16], zeros beyond n: one vector is sixteen outputs of one input."""

    packed: torch.Tensor
    n: int

    @property
    def k(self) -> int:
        return self.packed.shape[1]


def pack_weight(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs (and converts) a weight [n, k]; the result owns its memory."""
    n, k = weight.shape
    panels = -(-n // PANEL)
    packed = torch.zeros(panels, k, PANEL, dtype=dtype)
    full = n // PANEL
    packed[:full] = weight[: full * PANEL].view(full, PANEL, k).transpose(1, 2)
    if n % PANEL:
        packed[full, :, : n % PANEL] = weight[full * PANEL :].t()
    return PackedWeight(packed, n)


class Kernels(Protocol):
    """The operations of one step over one KV cache.

    Tensors are C-contiguous and of the cache's dtype unless said otherwise. Each row of a result has the same
    bits whatever other rows the call has. Steps that do not fit the cache raise IndexError or ValueError."""

    def rope_write(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        q: torch.Tensor,
    ) -> None:
        """Splits qkv [>=T, (heads + 2 kv_heads) * head_dim], norms q and k per head (weights [head_dim] or None),
        rotates by cos and sin (float32 [positions, head_dim / 2]). K and V go into the cache, the queries into
        q [>=T, heads * head_dim]."""
        ...

    def attention(
        self, layer: int, q: torch.Tensor, scale: float, window: int | None, out: torch.Tensor
    ) -> None:
        """out = softmax(scale q K) V, causal, over the last `window` keys if given. q, out: [>=T, heads * head_dim]."""
        ...

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, rows: int
    ) -> None:
        """out [>=rows, n] = x [>=rows, k] W^T + bias [n], for the first `rows` rows."""
        ...

    def add_rms_norm(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        out: torch.Tensor | None,
        rows: int,
    ) -> None:
        """residual += x, then out = weight * rms_norm(residual), for the first `rows` rows of [>=rows, n]."""
        ...

    def silu_mul(self, x: torch.Tensor, out: torch.Tensor, rows: int) -> None:
        """out [>=rows, n] = silu(x[:, :n]) * x[:, n:], for the first `rows` rows."""
        ...
