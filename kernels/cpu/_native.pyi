from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

SOURCES: str
STORE: int
ADD: int
SILU_MUL: int
GELU_MUL: int
EXPERTS_MAX: int
TABLES: int
FLOAT: int
DENSE: int
INT8_ROW: int
INT8_F16: int
INT4_F16: int
INT4_F16_MIN: int
INT4_F32_MIN: int
INT4_K: int

class Team:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    def beats(self) -> int: ...

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
    def set_planes(
        self, planes: npt.NDArray[np.int32], plane_size: int, to_values: int, to_block: int
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
    @property
    def tokens(self) -> int: ...
    @property
    def context(self) -> int: ...

class Stage:
    def __init__(
        self,
        team: Team,
        kv: Cache,
        num_layers: int,
        hidden: int,
        intermediate: int,
        heads: int,
        eps: float,
        scale: float,
    ) -> None: ...
    def set_ways(self, gelu: bool, norm_wide: bool, embed_scale: float, softcap: float) -> None: ...
    def set_layer(
        self,
        index: int,
        norms: Sequence[int],
        weights: Sequence[tuple[int, int, int, int] | None],
        window: int,
        table: int,
    ) -> None: ...
    def set_cuts(
        self, index: int, o_ends: npt.NDArray[np.int64], down_ends: npt.NDArray[np.int64]
    ) -> None: ...
    def set_experts(
        self,
        index: int,
        router: tuple[int, int, int, int],
        gate_ups: Sequence[tuple[int, int, int, int]],
        downs: Sequence[tuple[int, int, int, int]],
        chosen: int,
        intermediate: int,
        normalised: bool,
    ) -> None: ...
    def set_routes(
        self,
        logits: int,
        weights: int,
        expert: int,
        place: int,
        first: int,
        gathered: int,
        activated: int,
        out: int,
        prepared: int,
    ) -> None: ...
    def set_ends(
        self, vocab: int, embed: int, norm: int, head: tuple[int, int, int, int], head_rows: int
    ) -> None: ...
    def set_buffers(
        self,
        residual: int,
        normed: int,
        qkv: int,
        q: int,
        attended: int,
        activated: int,
        picked: int,
        prepared: int,
    ) -> None: ...
    def set_rotary(self, table: int, cos: int, sin: int, table_rows: int, rotated: int) -> None: ...
    def forward(
        self, step: Step, source: npt.NDArray[np.int64] | Buffer, picked: npt.NDArray[np.int32], out: int
    ) -> bool: ...

class Rank:
    def __init__(self, stage: Stage, kv_heads: int, shards: int) -> None: ...
    def set_heads(
        self,
        data_parallel: bool,
        kv: Cache,
        heads: int,
        weights: Sequence[Sequence[tuple[int, int, int, int]]],
        ends: npt.NDArray[np.int64],
    ) -> None: ...
    def set_room(self, data_parallel: bool, normed: int, qkv: int, q: int, attended: int) -> None: ...
    def set_shards(self, index: int, inputs: int, ends: npt.NDArray[np.int64]) -> None: ...
    def set_exchange(self, exchange: int, timeout_ns: int) -> None: ...
    def forward(
        self,
        step: Step,
        owned: Step,
        places: npt.NDArray[np.int32],
        source: npt.NDArray[np.int64] | Buffer,
        picked: npt.NDArray[np.int32],
        out: int,
    ) -> tuple[int, bool]: ...

def attention(
    team: Team,
    kv: Cache,
    layer: int,
    step: Step,
    q: int,
    out: int,
    heads: int,
    scale: float,
    window: int,
) -> None: ...
def rope_write(
    team: Team,
    kv: Cache,
    layer: int,
    step: Step,
    qkv: int,
    stride: int,
    cos: int,
    sin: int,
    table_rows: int,
    rotated: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    wide: bool,
    heads: int,
    q: int,
) -> None: ...
def rms_norm(
    team: Team,
    x: int,
    weight: int,
    out: int,
    rows: int,
    n: int,
    eps: float,
    wide: bool,
    add: bool,
    is_bf16: bool,
) -> None: ...
def linear(
    team: Team,
    x: int,
    weight: tuple[int, int, int, int],
    out: int,
    prepared: int,
    rows: int,
    k: int,
    n: int,
    epilogue: int,
    is_bf16: bool,
    ends: npt.NDArray[np.int64] | None = None,
) -> None: ...
def prepared_size(k: int) -> int: ...
def panel_size(format: int, k: int, span: int) -> int: ...
def set_isa(isa: int) -> int: ...
