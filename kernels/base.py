"""What a kernel back end does, and what it may expect from a stage, a KV cache and a step.

The data plane's KVCache and StepArrays satisfy these protocols; kernels never import the data plane."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.quantised import Quantised, Weight

Activation = Literal["silu", "gelu_tanh"]  # between gates and ups
# How products whose inputs several ranks may share are summed: "float", in float32, in one order; "fixed", over shards
# in 64-bit fixed point (kernels/ranks/sums.h), the same bits for any number of ranks.
Sums = Literal["float", "fixed"]
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
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    @property
    def tensor(self) -> torch.Tensor:
        """The weight where it is not quantised. Raises TypeError where it is."""
        return tensor_of(self.weight)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight's values, [n, k]."""
        values = self.weight.dense() if isinstance(self.weight, Quantised) else self.weight
        return values.to(dtype)


@dataclass(frozen=True, slots=True)
class Mlp:
    """gate_up [2 intermediate, hidden]: all gates, then all ups; down [hidden, intermediate]."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture: a row takes the `chosen` experts whose logits, of the router [experts, hidden], are the largest, and
    adds up their outputs. Weights are the softmax of the logits over all experts, or over the chosen (`normalised`)."""

    router: torch.Tensor
    experts: tuple[Mlp, ...]
    chosen: int
    normalised: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norms: float32. qkv: queries, keys, values merged. q_norm, k_norm: [head_dim], per head.
    window: keys a query sees (None = all). attention_out_norm, mlp_out_norm: of what attention and what the MLP add.
    rotary: which of the stage's tables."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    mlp: Mlp | Experts
    window: int | None
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None
    rotary: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The final norm, float32 [hidden], and the output weight [vocab, hidden]. softcap: logits become
    softcap * tanh(logits / softcap); 0: they stay."""

    norm: torch.Tensor
    weight: Weight
    softcap: float = 0.0

    @property
    def tensor(self) -> torch.Tensor:
        """As Linear.tensor."""
        return tensor_of(self.weight)


class Rotary(Protocol):
    """Cosines and sines by position: float32 [positions, rotated / 2], for as many positions as are covered. The first
    `rotated` values of a head are rotated, the others stay as they are."""

    cos: torch.Tensor
    sin: torch.Tensor
    max_positions: int

    def cover(self, positions: int) -> None: ...


@dataclass(frozen=True, slots=True)
class StageSpec:
    """The layers of one stage; all tensors but norms and those of quantised weights have the dtype of the KV cache.
    rotary: the tables that layers name. embed [vocab, hidden]: first stage only; head: last stage only. intermediate:
    of layers that are no mixtures. scale: of attention; None: head_dim ** -0.5.
    embed_scale: what embeddings are multiplied by. norm_wide: norms round once, after the weight."""

    hidden: int
    intermediate: int
    heads: int
    eps: float
    rotary: tuple[Rotary, ...]
    layers: tuple[Layer, ...]
    embed: torch.Tensor | None
    head: Head | None
    scale: float | None = None
    activation: Activation = "silu"
    embed_scale: float = 1.0
    norm_wide: bool = False


class CannotCompute(ValueError):
    """A device cannot do, or has no room for, what was asked of it; the message says why."""


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
