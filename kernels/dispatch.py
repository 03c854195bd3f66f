"""Which kernels run a stage: those of its KV cache's device."""

from kernels.base import PagedCache, StageKernels, StageSpec
from kernels.cpu.stage import CpuStage


def build_stage(spec: StageSpec, kv: PagedCache, threads: int = 1) -> StageKernels:
    """The stage's layers on the device of `kv`. The weights are converted to what its kernels read, and may be let go.

    Raises ValueError for sizes or a device that there are no kernels for."""
    match kv.device:
        case "cpu":
            return CpuStage(spec, kv, threads)
        case device:
            raise ValueError(f"no kernels for device {device!r}")
