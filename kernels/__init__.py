"""Compute kernels behind one dispatch. Importing this is silent and needs no GPU."""

from kernels.base import Head, Layer, Linear, PagedCache, StageKernels, StageSpec, StepArrays
from kernels.cpu.stage import CpuStage

__all__ = ["Head", "Layer", "Linear", "PagedCache", "StageKernels", "StageSpec", "StepArrays", "build_stage"]


def build_stage(spec: StageSpec, kv: PagedCache, threads: int = 1) -> StageKernels:
    """The stage's layers on the device of `kv`. The weights are converted to what its kernels read, and may be let go.

    Raises ValueError for sizes or a device that there are no kernels for."""
    match kv.device:
        case "cpu":
            return CpuStage(spec, kv, threads)
        case device:
            raise ValueError(f"no kernels for device {device!r}")
