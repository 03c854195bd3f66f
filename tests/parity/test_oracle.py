"""The oracle executor: the same tokens on every path, and a wrong one as soon as a block is wrong."""

import numpy as np
import pytest

from dataplane._fast.blocktable import BlockTable
from dataplane.model.oracle import OracleExecutor
from tests.parity.chain import Chain

PROMPT = np.random.default_rng(0).integers(0, 4096, 45).tolist()


def chain(num_stages: int, name: str = "demo", block_size: int = 16) -> Chain:
    made = Chain.__new__(Chain)
    made.block_size = block_size
    made.stages = [
        OracleExecutor(name, s, num_stages, num_blocks=64, block_size=block_size) for s in range(num_stages)
    ]
    made.tables = [BlockTable(8, 64, block_size) for _ in made.stages]
    made.free = [np.random.default_rng(s).permutation(64).tolist() for s in range(num_stages)]
    made.lengths = {}
    return made


@pytest.mark.parametrize("stages", [1, 4])
def test_same_tokens_on_every_path(stages: int) -> None:
    want = chain(stages).greedy([PROMPT], 30)[0]
    assert len(set(want)) > 25
    for size, step in ((16, 1), (16, 7), (3, 16), (64, 44)):
        assert chain(stages, block_size=size).greedy([PROMPT], 30, step)[0] == want
    assert chain(stages).greedy([PROMPT[:20], PROMPT, PROMPT[::-1]], 30, 5)[1] == want
    assert chain(stages, "other").greedy([PROMPT], 30)[0] != want
    assert chain(stages).greedy([[PROMPT[0] ^ 1, *PROMPT[1:]]], 30)[0] != want


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("position", [0, 17, 44])
def test_a_wrong_block_shows(stage: int, position: int) -> None:
    def continued(spoil: bool) -> list[int]:
        c = chain(3)
        row = c.new()
        token = int(c.step([(row, PROMPT)])[row][-1].argmax())
        if spoil:
            block = c.tables[stage].blocks(row)[position // 16]
            view = c.stages[stage].kv.view(block)
            view[position % 16 * 8] ^= 1
        return [token := int(c.step([(row, [token])])[row][-1].argmax()) for _ in range(3)]

    assert continued(False) == continued(False)
    assert all(a != b for a, b in zip(continued(False), continued(True), strict=True))
