"""Blocks to and from host memory, and their sums: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

from dataplane.kvwork import blocks_as_bytes
from kernels.cuda import transfer as transfers
from kernels.cuda.cache import DeviceCache
from kernels.cuda.transfer import BlockTransfer
from kernels.triton.blocks import GOLDEN, KEY, MIX_1, MIX_2
from tests.gpu.steps import make_cache

TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
# On a GPU any of the releases that we name will do.
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and TRITON < (3, 9),
    reason=f"the interpreter of triton {version('triton')} does not let sums of 32 bits wrap around; that of 3.9 does",
)


def sum_of(block: bytes) -> int:
    """What kernels/triton/blocks.py says a sum is, in plain numpy."""
    word = np.frombuffer(block, "<u4")
    place = np.arange(len(word), dtype=np.uint32)
    mixed = word ^ (place * np.uint32(GOLDEN) + np.uint32(KEY))
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(MIX_1)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(MIX_2)
    mixed ^= mixed >> np.uint32(16)
    return int(mixed.sum(dtype=np.uint32))


def bytes_in(cache: DeviceCache, block: int) -> bytes:
    plane = cache.planes[:, :, block].contiguous().cpu()
    return plane.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("staging", [1, 3, 100])
def test_blocks_go_out_and_come_back(device, dtype, staging, monkeypatch) -> None:
    """In several turns, too, where the staging is small."""
    source = make_cache(device, dtype, blocks=9, layers=3)
    target = make_cache(device, dtype, blocks=9, layers=3)
    target.planes.zero_()
    monkeypatch.setattr("kernels.cuda.transfer.STAGING_BYTES", staging * source.block_bytes)
    out, back = BlockTransfer(source), BlockTransfer(target)
    assert out.piece_blocks == staging
    blocks = [7, 0, 3, 8, 3]
    data, sums = out.gather(blocks)
    assert data == b"".join(bytes_in(source, block) for block in blocks)
    assert sums.dtype == np.uint32
    assert sums.tolist() == [sum_of(bytes_in(source, block)) for block in blocks]
    assert out.sums([8, 7]).tolist() == [sums[3], sums[0]]
    assert back.sums_of(memoryview(data)[:-1]).tolist() == sums.tolist()[:-1], "whole blocks only"
    back.scatter([1, 2, 5, 6], data, [4, 0, 1, 3])
    for block, origin in ((1, 3), (2, 7), (5, 0), (6, 8)):
        assert bytes_in(target, block) == bytes_in(source, origin)
    assert not target.planes[:, :, [0, 3, 4, 7, 8]].any()
    assert back.sums([2, 1]).tolist() == [sums[0], sums[2]]


def test_sums_of_more_blocks_than_a_launch_takes(device, monkeypatch) -> None:
    cache = make_cache(device, "bfloat16", blocks=3, layers=1, kv_heads=1)
    transfer, launched, real = BlockTransfer(cache), [], transfers.sum_blocks

    def sum_blocks(planes, blocks, sums) -> None:
        launched.append(len(blocks))
        if cache.planes.is_cuda:
            real(planes, blocks, sums)
        else:  # the interpreter would take minutes
            sums.copy_(blocks)

    monkeypatch.setattr(transfers, "sum_blocks", sum_blocks)
    sums = transfer.sums([0, 1, 2] * 50_000)
    assert launched == [65_535, 65_535, 18_930]
    assert sums.tolist() == sums[:3].tolist() * 50_000


def test_a_flipped_bit_changes_the_sum(device) -> None:
    cache = make_cache(device, "bfloat16", blocks=2, layers=1, kv_heads=1)
    transfer = BlockTransfer(cache)
    data, (good,) = transfer.gather([1])
    rng = np.random.default_rng(5)
    for bit in rng.choice(8 * len(data), 40, replace=False).tolist():
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert transfer.sums_of(changed).tolist() != [good]
    swapped = data[4:8] + data[:4] + data[8:]
    assert transfer.sums_of(swapped).tolist() != [good], "the place of a word counts"


def test_a_warm_up_runs_every_kernel_and_changes_nothing(device, monkeypatch) -> None:
    """What copies, scrubs and restores launch is compiled when nobody waits for it."""
    launched: set[str] = set()
    for name in ("gather_blocks", "scatter_blocks", "sum_blocks", "sum_pieces"):
        real = getattr(transfers, name)
        monkeypatch.setattr(
            transfers, name, lambda *given, real=real, name=name: (launched.add(name), real(*given))
        )
    cache = make_cache(device, "bfloat16", blocks=3)
    before = cache.planes.clone()
    blocks_as_bytes(cache).warm_up()
    assert launched == {"gather_blocks", "scatter_blocks", "sum_blocks", "sum_pieces"}
    assert torch.equal(cache.planes, before)


def test_what_is_not_there_is_refused(device) -> None:
    cache = make_cache(device, "float32", blocks=3)
    transfer = BlockTransfer(cache)
    data, _ = transfer.gather([1])
    for call in (
        lambda: transfer.gather([3]),
        lambda: transfer.sums([-1]),
        lambda: transfer.scatter([3], data, [0]),
    ):
        with pytest.raises(IndexError, match="is not one of 3"):
            call()
    with pytest.raises(ValueError, match="has no block 1"):
        transfer.scatter([0], data, [1])
    assert transfer.gather([])[0] == b""
    assert len(transfer.sums([])) == 0
