"""kill -9 under quantised weights: the tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.contract.config import EngineConfig
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.parity.gguf_files import make_checkpoint, write

TOKENS = 96


@pytest.fixture(scope="module", params=["int8", "gguf"])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, etcd_binary: None
) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("model")
    if request.param == "int8":
        engine, settings = EngineConfig(pool_blocks=512, weights="int8", dtype="bfloat16"), {}
    else:
        make_checkpoint(folder / "checkpoint")
        path, _ = write(folder / "checkpoint", "Q4_1", folder)
        engine, settings = EngineConfig(pool_blocks=512), {"model": str(path)}
    with Cluster(instances=2, stages=2, engine=engine, **settings) as running:
        yield running


@pytest.mark.parametrize("victim", ["n0", "n3"])
def test_a_killed_node_costs_no_token(quantised: Cluster, victim: str) -> None:
    asked = sample_prompts(6, TOKENS)
    asyncio.run(quantised.wait_all_home())
    asyncio.run(quantised.references(asked))

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) >= 20 for stream in streams), "tokens flow")
        quantised.kill(victim)

    streams = asyncio.run(while_streaming(quantised, asked, kill))
    asyncio.run(quantised.expect_equal(streams))
    asyncio.run(quantised.wait_all_home())
