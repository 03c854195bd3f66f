import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

def crc32(data: Buffer, value: int = 0) -> int: ...
def use_tables(only: bool) -> None: ...
def block_sums(
    pool: npt.NDArray[np.uint8],  # [num_blocks, block_bytes]
    blocks: npt.NDArray[np.int64],  # [B]
) -> npt.NDArray[np.uint32]: ...  # [B]
def gather_blocks(
    pool: npt.NDArray[np.uint8],  # [num_blocks, block_bytes]
    blocks: npt.NDArray[np.int64],  # [B]
    out: Buffer,  # B * block_bytes
) -> npt.NDArray[np.uint32]: ...  # [B]
def scatter_blocks(
    pool: npt.NDArray[np.uint8],  # [num_blocks, block_bytes]
    blocks: npt.NDArray[np.int64],  # [B]
    data: Buffer,  # pieces of block_bytes
    places: npt.NDArray[np.int64],  # [B] indices of pieces
) -> None: ...
def piece_sums(data: Buffer, size: int) -> npt.NDArray[np.uint32]: ...  # of each whole piece
