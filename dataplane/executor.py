"""Runs one stage of the model on this process's device."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from controlplane.contract.errors import ConfigError
from dataplane._fast.blocktable import StepArrays
from dataplane.core import activations
from dataplane.kvcache import KVCache
from dataplane.kvwork import blocks_as_bytes
from dataplane.model.config import ModelConfig, ModelDtype, load_config
from dataplane.model.digests import digest_as, digest_once, identities
from dataplane.model.errors import ModelError
from dataplane.model.layers import Weights, build_spec
from dataplane.model.quantised import UnsupportedWeight
from dataplane.model.split import split_layers
from dataplane.model.weights import load_weights, stage_files, stage_shapes, weights_digest
from dataplane.numerics import device_kind, numerics_of
from dataplane.ranks.stage import RankedStage
from kernels.base import DTYPES, CannotCompute, StageKernels, Sums
from kernels.cpu._native import Team
from kernels.cpu.stage import CpuStage
from kernels.dispatch import CacheShape, build_cpu_stage, build_cuda_stage

if TYPE_CHECKING:
    from kernels.cuda.cache import DeviceCache

# By device: a step of up to so many tokens takes mostly the time of reading the weights. Measured on half of model S in
# bfloat16: on a CPU two steps cost 1.3 times one of as many tokens in all up to 16 tokens each, and 1.0 times at 32.
# On a GPU it is not measured; a tile of products has 64 rows, used or not (kernels/triton/linear.py).
LIGHT_TOKENS = {"cpu": 32, "cuda": 64}


class StageExecutor:
    """One stage: its layers, its KV cache, and the embedding or the output head where it has them.

    device: "cpu", or a GPU ("cuda:2"). There, rows_max are the tokens of a step, and num_blocks 0 are as many KV blocks
    as memory_share of its memory leaves. context_max: of the longest context that is to be served (see load_config).

    ranks: processes that compute the stage together; more than one are forked here, so the caller must have no thread.

    Not thread-safe: one thread at a time calls forward(). Raises ModelError for a checkpoint that cannot be
    served, ValueError for a stage that does not exist or a device that is not supported."""

    step_s = 0.0  # see dataplane/oracle.py

    def __init__(
        self,
        model_dir: Path,
        stage: int,
        num_stages: int,
        *,
        num_blocks: int,
        rows_max: int = 512,
        memory_share: float = 0.9,
        block_size: int = 16,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        weights: Weights = "model",
        device: str = "cpu",
        threads: int = 1,
        attention: Literal["exact", "xformers"] = "exact",
        sums: Sums = "float",
        ranks: int = 1,
        context_max: int = 0,
        digest_file: Path | None = None,
    ) -> None:
        self.config: ModelConfig = load_config(model_dir, context_max)
        c = self.config
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage {stage} is not one of {num_stages}")
        if num_stages > c.num_layers:
            raise ModelError(
                model_dir / "config.json", "num_hidden_layers", f"{c.num_layers} layers, {num_stages} stages"
            )
        self.layers: range = split_layers(c.num_layers, num_stages)[stage]
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.hidden_size = c.hidden_size
        kind_of_device = device.partition(":")[0]
        if kind_of_device not in LIGHT_TOKENS:
            raise ValueError(f"no kernels for device {device!r}")
        if sums == "fixed" and kind_of_device != "cpu":
            raise ValueError(f"device {device!r} has no kernels for fixed-point sums")
        # Two steps of no more than that together are cheaper as one.
        self.light_tokens = LIGHT_TOKENS[kind_of_device]
        self.dtype: ModelDtype = c.dtype if dtype == "auto" else dtype
        shape = CacheShape(len(self.layers), c.num_kv_heads, block_size, c.head_dim, self.dtype)
        self.numerics: str = numerics_of(
            c,
            self.layers,
            dtype=self.dtype,
            device=device_kind(device),
            attention=attention,
            block_size=block_size,
            weights=weights,
            sums=sums,
        )
        kind = DTYPES[self.dtype]
        # Weights are packed into memory of the kernels'; the mapping of the files ends with this constructor, except
        # for the embedding, of which a step reads a few rows.
        seen = identities(stage_files(model_dir, list(stage_shapes(c, self.layers))))
        tensors = load_weights(model_dir, c, self.layers)
        digest = digest_once(lambda: weights_digest(tensors), tensors, seen, digest_file)
        self.weights_digest: str = digest_as(digest, weights)
        with torch.inference_mode():
            try:
                spec = build_spec(c, self.layers, tensors, kind, weights)
            except UnsupportedWeight as error:
                raise ModelError(model_dir, None, str(error)) from error
            self.kv: KVCache | DeviceCache
            self._stage: StageKernels
            if device == "cpu":
                self.kv = KVCache(
                    num_blocks,
                    shape.layers,
                    shape.kv_heads,
                    block_size,
                    shape.head_dim,
                    self.dtype,
                    shared=ranks > 1,
                )
                if ranks > 1:
                    self._stage = RankedStage(
                        spec,
                        self.kv,
                        ranks,
                        threads=threads,
                        rows_max=max(rows_max, self.light_tokens),
                        context_max=min(c.max_positions, num_blocks * block_size),
                    )
                else:
                    self._stage = build_cpu_stage(spec, self.kv, threads, attention, sums)
            else:
                self._stage = built = build_cuda_stage(
                    spec,
                    shape,
                    device,
                    rows_max=max(rows_max, self.light_tokens),  # to so many, steps of several pipelines join
                    num_blocks=num_blocks,
                    memory_share=memory_share,
                    attention=attention,
                )
                self.kv = built.kv
        self.block_wire_bytes = self.kv.block_bytes
        # Threads of this host that are idle between two calls of forward(): sampling has them then.
        self.team = self._stage.team if isinstance(self._stage, CpuStage) else Team(threads)
        self.may_wait = ranks > 1  # for processes of its own: forward() is not for an event loop

    def warm_up(self) -> None:
        """Does whatever a first step, or a first copy, would have to wait for: to be called before anybody is served.
        Raises ConfigError where the device turns out not to be able to."""
        try:
            self._stage.warm_up()
        except CannotCompute as error:
            raise ConfigError(str(error)) from error
        blocks_as_bytes(self.kv).warm_up()

    def troubles(self) -> tuple[str, ...]:
        """What of it does not work now, in words."""
        return self._stage.troubles() if isinstance(self._stage, RankedStage) else ()

    @property
    def ranks_lost(self) -> int:
        """Ranks that have ended since the start."""
        return self._stage.lost if isinstance(self._stage, RankedStage) else 0

    @property
    def suspect(self) -> bool:
        """Whether the activations that forward() returned last may have a number that is not finite."""
        return self._stage.suspect

    def beats(self) -> int | None:
        """See kernels.base.StageKernels."""
        return self._stage.beats()

    def adopt(self, hidden: activations.Buffer, tokens: int) -> activations.Buffer:
        """What the stage before sent for so many tokens, in this stage's precision. Raises ValueError."""
        return activations.in_precision(hidden, tokens * self.hidden_size, self.dtype)

    def forward(
        self,
        tokens: npt.NDArray[np.int64] | None,
        hidden: Buffer | None,
        step: StepArrays,
        sample_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.generic]:
        """One step of T tokens. The first stage takes tokens int64 [T], the others the activations that the stage
        before returned. The last returns logits float32 [K, vocab] of the K rows in sample_rows (indices into T),
        the others their activations [T, hidden] (bfloat16 as uint16). Logits are valid until the next call, activations
        are the caller's own.

        Raises ValueError or IndexError for inputs that do not fit; the KV cache may then hold part of the step,
        in slots that the step named."""
        source = tokens if self.is_first else hidden
        if source is None:
            raise ValueError("a first stage needs tokens, any other one activations")
        return self._stage.forward(source, step, sample_rows)
