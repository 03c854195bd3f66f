"""Settings at their edges, and the context that a small pool holds, on a real cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from controlplane.contract.config import EngineConfig
from tests.e2e.cluster import Cluster

# Half of the pool is 32 blocks: 512 tokens, where the model could have 2,048.
CONTEXT = 512
ENGINE = EngineConfig(max_running=32, max_batch_tokens=32, microbatches=1, pool_blocks=64)


@pytest.fixture(scope="module")
def cluster(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(stages=1, engine=ENGINE) as running:
        yield running


def options(cluster: Cluster) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {cluster.local.api_key}"}
    return {"base_url": cluster.local.gateway_url, "headers": headers, "timeout": 60}


def test_as_many_places_as_a_step_has_rows(cluster: Cluster) -> None:
    """All places decode and more wait: 77 of 140 requests were answered 500, and each node died four times."""
    before = cluster.local.node_pids()

    async def all_at_once() -> list[int]:
        async with httpx.AsyncClient(**options(cluster), limits=httpx.Limits(max_connections=200)) as http:

            async def ask(number: int) -> int:
                body = {"model": cluster.local.config.model_name, "prompt": [3 + number], "max_tokens": 1}
                return (await http.post("/v1/completions", json=body)).status_code

            return await asyncio.gather(*map(ask, range(140)))

    assert Counter(asyncio.run(all_at_once())) == {200: 140}
    assert cluster.local.node_pids() == before


def test_the_served_context_is_advertised_and_held(cluster: Cluster) -> None:
    name = cluster.local.config.model_name
    with httpx.Client(**options(cluster)) as http:
        models = http.get("/v1/models").json()
        assert models["data"][0]["max_model_len"] == CONTEXT
        tokens = http.post("/tokenize", json={"model": name, "prompt": "x"}).json()
        assert tokens["max_model_len"] == CONTEXT

        def ask(prompt: int, **more: int) -> httpx.Response:
            body = {"model": name, "prompt": [5] * prompt, "ignore_eos": True} | more
            return http.post("/v1/completions", json=body)

        for refused in (ask(CONTEXT, max_tokens=1), ask(CONTEXT - 10, max_tokens=11)):
            assert refused.status_code == 400
            assert f"maximum context length is {CONTEXT}" in refused.json()["error"]["message"]
        for prompt, more, generated in (
            (CONTEXT - 1, {"max_tokens": 1}, 1),
            (12, {"max_tokens": CONTEXT - 12}, CONTEXT - 12),
            (CONTEXT - 3, {}, 3),  # not asked for 16, only given them
        ):
            answer = ask(prompt, **more)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == generated
