"""Activations between stages of different precision, as a rolling restart that changes it makes them for a while."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Buffer = bytes | bytearray | memoryview
_SIZES = {"float32": 4, "bfloat16": 2}
_EXPONENT = np.uint32(0x7F800000)


def in_precision(payload: Buffer, values: int, dtype: Literal["float32", "bfloat16"]) -> Buffer:
    """`values` activations as `dtype`, whichever of the two they came in. bfloat16 becomes float32 exactly, float32 is
    rounded to the nearest, halves to even. Raises ValueError if there are not so many."""
    size = memoryview(payload).nbytes
    if size == values * _SIZES[dtype]:
        return payload
    if dtype == "float32" and size == 2 * values:
        wide = np.frombuffer(payload, np.uint16).astype(np.uint32) << np.uint32(16)
        return _bytes(wide)
    if dtype == "bfloat16" and size == 4 * values:
        bits = np.frombuffer(payload, np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        special = (bits & _EXPONENT) == _EXPONENT  # infinities stay; what is no number stays none
        quiet = (bits >> np.uint32(16)) | np.where(bits & np.uint32(0x7FFFFF), np.uint32(0x40), np.uint32(0))
        narrow = np.where(special, quiet, rounded).astype(np.uint16)
        return _bytes(narrow)
    raise ValueError(f"{size} bytes are not {values} activations")


def _bytes(array: npt.NDArray[np.generic]) -> memoryview:
    data: memoryview = array.data
    return data.cast("B")
