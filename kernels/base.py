"""What a kernel back end does, and what it may expect from a stage, a KV cache and a step.

The data plane's KVCache and StepArrays satisfy these protocols; kernels never import the data plane."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.quantised import Quantised, Weight

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def tensor_of(weight: Weight) -> torch.Tensor:
    if isinstance(weight, Quantised):
        raise TypeError(f"a weight of the format {weight.format.name} where only dense ones are")
    return weight


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [n, k] and optional bias [n]."""

    weight: Weight
    bias: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The weight where it is not quantised. Raises TypeError where it is."""
        return tensor_of(self.weight)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight's values, [n, k]."""
        values = self.weight.dense() if isinstance(self.weight, Quantised) else self.weight
        return values.to(dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. qkv: queries, keys, values merged; gate_up: all gates, then all ups.
    q_norm, k_norm: [head_dim], per head. window: keys a query sees (None = all)."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int | None


@dataclass(frozen=True, slots=True)
class Head:
    """The final norm [hidden] and the output weight [vocab, hidden]."""

    norm: torch.Tensor
    weight: Weight

    @property
    def tensor(self) -> torch.Tensor:
        """As Linear.tensor."""
        return tensor_of(self.weight)


class Rotary(Protocol):
    """Cosines and sines by position: float32 [positions, head_dim / 2], for as many positions as are covered."""

    cos: torch.Tensor
    sin: torch.Tensor
    max_positions: int

    def cover(self, positions: int) -> None: ...


@dataclass(frozen=True, slots=True)
class StageSpec:
    """The layers of one stage; all tensors but those of quantised weights have the dtype of the KV cache.
    embed [vocab, hidden]: first stage only; head: last stage only."""

    hidden: int
    intermediate: int
    heads: int
    eps: float
    rotary: Rotary
    layers: tuple[Layer, ...]
    embed: torch.Tensor | None
    head: Head | None


class StageKernels(Protocol):
    """One stage on one device. A row's numbers have the same bits whatever other rows a step has.

    suspect: the activations that forward() returned last may have a number that is not finite (False: none has)."""

    suspect: bool

    def warm_up(self) -> None:
        """Does whatever a first step would have to wait for. Once, before anybody is served."""
        ...

    def forward(
        self, source: npt.NDArray[np.int64] | Buffer, step: StepArrays, picked: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.generic]:
        """One step of T tokens. source: tokens int64 [T] where the stage has an embedding, else what the stage before
        returned. Returns activations [T, hidden] (bfloat16 as uint16), which are the caller's own, or with a head the
        logits float32 [K, vocab] of the rows `picked` [K], valid until the next call.

        Not thread-safe. Raises ValueError or IndexError for a step that does not fit; the KV cache may then hold part
        of it, in slots that it named."""
        ...

    def beats(self) -> int | None:
        """Grows while a computation advances, however slowly; -1 while none is under way. From any thread. None: this
        device cannot tell."""
        ...
