import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import StepArrays

def stage_hashes(
    hashes: npt.NDArray[np.uint64],  # [T]
    blocks: npt.NDArray[np.uint64],  # [num_blocks, block_size]
    step: StepArrays,
    stage: int,
    weights: npt.NDArray[np.uint64],  # of the positions from 0 on
) -> npt.NDArray[np.uint64]: ...  # [T]
