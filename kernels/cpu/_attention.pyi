import numpy as np
import numpy.typing as npt

class Cache:
    def __init__(
        self,
        base: int,
        num_blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        is_bf16: bool,
    ) -> None: ...

class Step:
    def __init__(
        self,
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        cu_q: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
    ) -> None: ...

def attention(
    kv: Cache, layer: int, step: Step, q: int, out: int, heads: int, scale: float, window: int
) -> None: ...
def rope_write(
    kv: Cache,
    layer: int,
    step: Step,
    qkv: int,
    stride: int,
    cos: int,
    sin: int,
    table_rows: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    heads: int,
    q: int,
) -> None: ...
def add_rms_norm(
    x: int, residual: int, weight: int, out: int, rows: int, n: int, eps: float, is_bf16: bool
) -> None: ...
def silu_mul(x: int, out: int, rows: int, n: int, is_bf16: bool) -> None: ...
def linear(x: int, w: int, bias: int, out: int, rows: int, k: int, n: int, is_bf16: bool) -> None: ...
def set_isa(isa: int) -> int: ...
