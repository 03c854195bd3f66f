"""Two pipelines on the same nodes, in one pass or each on nodes of its own: equal bits of everything."""

import asyncio
from typing import Literal

import numpy as np
import pytest

from dataplane.core.messages import ResultMeta
from dataplane.executor import StageExecutor
from dataplane.inbox import Item
from tests.core.data.line import Line, step
from tests.parity.conftest import Build

BLOCK = 16


def steps(pipeline: str) -> list[Item]:
    """A prompt of three requests in chunks, then decodes beside another prompt; each pipeline has tokens of its own."""
    rng = np.random.default_rng(ord(pipeline))
    sizes = (
        [(1, 0, 5), (2, 0, 7), (3, 0, 1)],
        [(1, 5, 9), (2, 7, 1), (3, 1, 3)],
        [(1, 14, 1), (2, 8, 1), (4, 0, 17)],
    )
    rows = [[(rid, start, rng.integers(0, 200, n).tolist()) for rid, start, n in some] for some in sizes]
    return [step(pipeline, number, some) for number, some in enumerate(rows)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_seven_to_one"])
def test_a_merged_step_has_the_bits_of_its_parts(
    build: Build, name: str, dtype: Literal["float32", "bfloat16"], threads: int
) -> None:
    def line(pipelines: str) -> Line:
        executors = [
            StageExecutor(
                build(name), index, 2, num_blocks=64, block_size=BLOCK, dtype=dtype, threads=threads
            )
            for index in range(2)
        ]
        for executor in executors:
            executor.light_tokens = 64  # the steps here are larger than what is worth merging
        return Line(executors, pipelines)

    async def both() -> None:
        alone, together = {name: line(name) for name in "pq"}, line("pq")
        rounds = zip(steps("p"), steps("q"), strict=True)
        for number, (p, q) in enumerate(rounds):
            want = [(await alone["p"].run([p], 1))[0], (await alone["q"].run([q], 1))[0]]
            got = await together.run([p, q] if number % 2 else [q, p], 2)
            assert all(isinstance(answer, ResultMeta) for answer in got)
            # With the logprobs, exactly: they have every logit of the row in them.
            assert sorted(got, key=lambda answer: answer.pipeline) == want
        assert together.merged == [3, 3]
        assert len({passed[2] for passed in together.passed}) == 6
        for name, own in alone.items():
            assert [passed for passed in together.passed if passed[0] == name] == own.passed
            assert together.kv(name) == own.kv(name)
            own.close()
        together.close()

    asyncio.run(both())
