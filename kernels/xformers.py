"""Attention through xFormers' paged masks, for those who prefer a library's speed to equal bits. Imports are silent,
and nothing of xFormers is imported before someone asks for it.

What it can keep of the guarantees (xFormers 0.0.35, read in its sources): one call's result depends on nothing but
its inputs, but a token's bits depend on its company. Its decode operator (triton_splitk) cuts the keys into a number
of splits computed from the batch, and takes only equal query counts up to 16 and pages of a multiple of 64 tokens,
which `engine.block_size` must be; prefills go to FlashAttention 2 or 3, if those packages are installed, which sum in
another order. So a recovered stream may differ in its last bits from the unfailed one, and greedy choices with it where
two logits are close. Never the default."""

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch

from kernels.base import CannotCompute, StepArrays

log = logging.getLogger(__name__)

PAGE_TOKENS = 64


class XformersMissing(CannotCompute):
    """xFormers cannot be used here; the message says why."""


@contextmanager
def _quiet() -> Iterator[None]:
    """xFormers warns at import where it finds no operators of its own; whether one fits is asked later."""
    logger = logging.getLogger("xformers")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def why_not(device: torch.device) -> str | None:
    """Why xFormers cannot be used on `device` at all, or None."""
    if device.type != "cuda":
        return f"xFormers has no operator for {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'kevlarflow[gpu]')"
    return None


class _Rows:
    """A step of rows that begin with so many tokens each, all in block 0, and tables of `width` blocks."""

    def __init__(self, rows: int, tokens: int, width: int) -> None:
        self.positions = self.slots = np.zeros(rows * tokens, np.int64)
        self.cu_q = np.arange(rows + 1, dtype=np.int32) * tokens
        self.context_lens = np.full(rows, tokens, np.int32)
        self.tables = np.zeros((rows, width), np.int32)


class PagedAttention:
    """Causal attention over a cache [layers, 2, num_blocks, block_size, kv_heads, head_dim]. Raises XformersMissing.

    Sliding windows are not for it: 0.0.35 has no paged mask for them."""

    def __init__(self, planes: torch.Tensor) -> None:
        reason = why_not(planes.device)
        if reason is not None:
            raise XformersMissing(reason)
        with _quiet():
            self._fmha = importlib.import_module("xformers.ops.fmha")
            self._bias = importlib.import_module("xformers.ops.fmha.attn_bias")
        layers, _, blocks, self._block_size, kv_heads, head_dim = planes.shape
        if self._block_size % PAGE_TOKENS:
            raise XformersMissing(
                f"xFormers' decode operator takes blocks of a multiple of {PAGE_TOKENS} tokens, and"
                f" engine.block_size is {self._block_size}"
            )
        # Steps without an operator: those of one token a row, or all others.
        self._none_for: set[bool] = set()
        self._pages = planes.view(layers, 2, 1, blocks * self._block_size, kv_heads, 1, head_dim)

    def warm_up(
        self, heads: int, scale: float, rows: Sequence[int], widths: Sequence[int], chunk: int
    ) -> None:
        """Runs decode steps of so many rows with tables of so many blocks, for which its kernels differ, and a prompt's
        chunk of so many tokens, all over block 0. Raises XformersMissing if there is no operator for decode steps:
        without one all that is left of this choice is its price."""
        for count, width in product(rows, widths):
            if not self._try(heads, scale, _Rows(count, 1, width)):
                raise XformersMissing(
                    "xFormers has no operator for decode steps of this model on this device"
                )
        self._try(heads, scale, _Rows(1, chunk, -(-chunk // self._block_size)))

    def _try(self, heads: int, scale: float, step: _Rows) -> bool:
        q = self._pages.new_zeros(len(step.positions), heads * self._pages.shape[-1])
        tables = torch.from_numpy(step.tables).to(self._pages.device)
        return self.attend(0, q, self.mask(step, tables), scale, torch.empty_like(q))

    def mask(self, step: StepArrays, tables: torch.Tensor) -> Any:
        """The mask of one step, for all its layers. tables: int32 [>=B, >=W] on the device."""
        rows, width = step.tables.shape
        plain = self._bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=(step.cu_q[1:] - step.cu_q[:-1]).tolist(),
            kv_padding=width * self._block_size,
            kv_seqlen=step.context_lens.tolist(),
            device=self._pages.device,
        )
        paged = self._bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        return plain.make_paged(tables[:rows, :width].contiguous(), self._block_size, paged)

    def attend(self, layer: int, q: torch.Tensor, mask: Any, scale: float, out: torch.Tensor) -> bool:
        """out = softmax(scale q K) V for q, out [T, heads * head_dim]. False if xFormers has no operator for this
        step (a chunk of prefill where no FlashAttention is installed, say): nothing is written then, and it is not
        asked again for steps of the kind."""
        decode = max(mask.q_seqinfo.max_seqlen, 1) == 1
        if decode in self._none_for:
            return False
        _, _, _, _, kv_heads, _, head_dim = self._pages.shape
        group = q.shape[1] // (kv_heads * head_dim)
        keys, values = (plane.expand(-1, -1, -1, group, -1) for plane in self._pages[layer])
        query = q.view(1, len(q), kv_heads, group, head_dim)
        try:
            result = self._fmha.memory_efficient_attention_forward(
                query, keys, values, mask, p=0.0, scale=scale
            )
        except NotImplementedError as error:  # how its dispatch says so
            kind = "decode steps" if decode else "chunks of prompts"
            log.warning("xFormers has no operator for %s, which run on our own kernel: %s", kind, error)
            self._none_for.add(decode)
            return False
        out.copy_(result.reshape(out.shape))
        return True
