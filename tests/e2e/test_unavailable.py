"""When no node is left for a stage: an explicit error, the truth on /health, and service again when one is back."""

from __future__ import annotations

import asyncio

import httpx

from controlplane.contract.status import PipelineState
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

PROMPTS = sample_prompts(6, 256)


def health(cluster: Cluster) -> int:
    return httpx.get(
        f"{cluster.local.gateway_url}/health", timeout=5.0, trust_env=False, verify=False
    ).status_code


def test_streams_end_with_an_error_and_the_group_returns(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))
    assert health(home) == 200

    async def kill_both(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 60, "tokens flow")
        for node in ("n2", "n6"):
            home.local.hold(node)
            home.kill(node)

    streams = asyncio.run(while_streaming(home, PROMPTS, kill_both))
    for stream in streams:  # each ended with [DONE], or the generator had raised
        assert stream.error, "a stream ended as if it were complete"
    asyncio.run(
        home.wait_for(
            lambda s: not s.available and all(p.state is PipelineState.DOWN for p in s.pipelines),
            "the group says that it is unavailable",
        )
    )
    assert health(home) == 503
    refused = httpx.post(
        f"{home.local.gateway_url}/v1/completions",
        json={"model": home.local.config.model_name, "prompt": "x", "max_tokens": 4},
        headers={"authorization": f"Bearer {home.local.api_key}"},
        timeout=10.0,
        trust_env=False,
    )
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["message"]
    for node in ("n2", "n6"):
        home.local.release(node)
    asyncio.run(home.wait_all_home())
    asyncio.run(home.expect_equal(asyncio.run(home.generator.streams(PROMPTS))))
    assert health(home) == 200


def test_streams_wait_for_a_replacement_that_comes_in_time(home: Cluster) -> None:
    """Both nodes of a stage die, and are restarted within the grace: everything is recomputed, nothing lost."""
    asyncio.run(home.references(PROMPTS))

    async def kill_both(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 60, "tokens flow")
        for node in ("n3", "n7"):
            home.kill(node)

    streams = asyncio.run(while_streaming(home, PROMPTS, kill_both))
    asyncio.run(home.expect_equal(streams))
