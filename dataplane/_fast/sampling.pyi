import numpy as np
import numpy.typing as npt

from controlplane.contract.requests import Sampling
from kernels.cpu._native import Team

SOURCES: str
TOP: np.dtype[np.void]
POISONED: int
NONE_LEFT: int
REJECTED: int

class SlotsFull(MemoryError):
    """No free slot."""

class DrawTable:
    def __init__(self, max_rows: int, vocab_size: int, team: Team | None = None) -> None: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def in_use(self) -> int: ...
    def admit(
        self,
        spec: Sampling,
        prompt: npt.NDArray[np.int32],
        output: npt.NDArray[np.int32],
        masks: npt.NDArray[np.int32] | None = None,
    ) -> int: ...
    def append(self, slots: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64]) -> None: ...
    def ban(self, slot: int, tokens: npt.NDArray[np.int32]) -> None: ...
    def length(self, slot: int) -> int: ...
    def seek(self, slot: int, length: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def sample(
        self,
        logits: npt.NDArray[np.float32],
        slots: npt.NDArray[np.int32],
        depths: npt.NDArray[np.int32] | None = None,
        drafts: npt.NDArray[np.int32] | None = None,
        masks: npt.NDArray[np.int32] | None = None,
        foreseen: npt.NDArray[np.uint8] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.void]]: ...
    def log_sum_exp(self, logits: npt.NDArray[np.float32]) -> float: ...
    def estimates(
        self, logits: npt.NDArray[np.float32], temperature: float
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64] | None, npt.NDArray[np.float64] | None]: ...
