"""kill -9 while steps have drafts: the tokens are those of a cluster that never drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from controlplane.contract.config import EngineConfig, Speculation
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from dataplane.demo import draft_dir
from tests.e2e.cluster import Cluster, until, while_streaming

TOKENS = 96
REPEATED = "The old lady said that she was glad to see him. " * 6
# At most temperatures, and with what an answer tells of log probabilities.
ASKED = [
    *sample_prompts(4, TOKENS),
    *(Prompt(REPEATED, seed, TOKENS, temperature=0.0, details=True) for seed in (1, 2)),
    *(Prompt(REPEATED + "He", seed, TOKENS, temperature=0.5) for seed in (3, 4)),
]


@pytest.fixture(params=["ngram", "draft"])
def drafting(request: pytest.FixtureRequest, etcd_binary: None) -> Iterator[Cluster]:
    mode: Speculation = request.param
    engine = EngineConfig(
        pool_blocks=512, speculation=mode, draft_model=str(draft_dir()) if mode == "draft" else ""
    )
    with Cluster(instances=2, stages=2, engine=engine) as running:
        yield running


def test_a_killed_node_costs_no_token(home: Cluster, drafting: Cluster) -> None:
    """The scheduler's node and a last stage, one after the other."""
    drafting.know(asyncio.run(home.references(ASKED)))
    asyncio.run(drafting.wait_all_home())

    async def kill(streams: list[Stream]) -> None:
        for victim, tokens in (("n0", 12), ("n3", 50)):
            await until(lambda: all(len(s.tokens) >= tokens for s in streams), "tokens flow")  # noqa: B023
            drafting.kill(victim)

    streams = asyncio.run(while_streaming(drafting, ASKED, kill))
    asyncio.run(drafting.expect_equal(streams))
    asyncio.run(drafting.wait_all_home())
