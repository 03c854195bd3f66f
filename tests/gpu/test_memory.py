"""How many KV blocks fit on a device. Arithmetic: no device is needed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

from kernels.cuda.memory import CONTEXT_BYTES, SLOTS_MAX, DeviceMemory, blocks_that_fit

GIB = 1 << 30
MIB = 1 << 20


def fits(memory: DeviceMemory, share: float, block_bytes: int = MIB, block_size: int = 16) -> int:
    return blocks_that_fit(memory, share, block_bytes, block_size, 4)


def test_the_share_less_what_is_there() -> None:
    memory = DeviceMemory(24 * GIB, 16 * GIB, 7 * GIB)
    assert fits(memory, 0.9) == int((24 * GIB * 0.9 - 7 * GIB - CONTEXT_BYTES) // MIB)


def test_never_more_than_is_free() -> None:
    memory = DeviceMemory(24 * GIB, 2 * GIB, GIB)
    assert fits(memory, 0.9) == (2 * GIB - CONTEXT_BYTES) // MIB


def test_positions_fit_into_the_kernels_numbers() -> None:
    memory = DeviceMemory(1 << 50, 1 << 50, 0)
    assert fits(memory, 1.0, block_bytes=16) == SLOTS_MAX // 16


def test_no_room_is_said_with_the_figures() -> None:
    with pytest.raises(
        ValueError, match=r"no room for 4 KV blocks .* of the device's 24.00 GiB .* may use 6.00"
    ):
        fits(DeviceMemory(24 * GIB, 20 * GIB, 6 * GIB), 0.25)
