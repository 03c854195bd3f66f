"""Log probabilities of prompts over a whole cluster: the same whoever dies while they are computed."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Cluster

REQUESTS = 12


def bodies() -> list[dict[str, Any]]:
    """Long prompts, some of which begin alike, of both APIs."""
    found: list[dict[str, Any]] = []
    for number in range(REQUESTS):
        tokens = [300 + (number // 2 * 31 + at * 17) % 1500 for at in range(900 + 40 * number)]
        asked: dict[str, Any] = {"prompt": tokens, "max_tokens": 24, "seed": number, "prompt_logprobs": 2}
        if number % 3 == 0:
            asked |= {"echo": True, "logprobs": 1, "n": 2}
        found.append(asked)
    return found


async def answers(cluster: Cluster, asked: list[dict[str, Any]]) -> list[Any]:
    headers = {"authorization": f"Bearer {cluster.local.api_key}"}
    async with httpx.AsyncClient(
        base_url=cluster.local.gateway_url, headers=headers, timeout=120, trust_env=False
    ) as client:
        found = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in asked))
    assert [answer.status_code for answer in found] == [200] * len(asked), found[0].text[:500]
    return [answer.json()["choices"] for answer in found]


@pytest.mark.parametrize("victim", ["n3", "n0"])
def test_a_kill_changes_no_log_probability(home: Cluster, victim: str) -> None:
    """Of the last stage, which computes them, and of the first, whose scheduler has what has come."""
    asked = bodies()

    async def run() -> None:
        wanted = await answers(home, asked)
        for body, choices in zip(asked, wanted, strict=True):
            assert all(len(choice["prompt_logprobs"]) == len(body["prompt"]) for choice in choices)
        assert len({str(choices[0]["prompt_logprobs"][1:3]) for choices in wanted}) > REQUESTS // 3
        given = asyncio.create_task(answers(home, asked))
        await home.wait_for(lambda s: any(p.running for p in s.pipelines), "requests run")
        home.kill(victim)
        assert await given == wanted
        await home.wait_all_home()

    asyncio.run(run())


def test_a_cached_prompt_has_the_same(home: Cluster) -> None:
    """Once before anything of it is cached, once after, once beside itself; and the cache is not spoilt."""
    tokens = [300 + at * 13 % 1500 for at in range(700)]

    async def run() -> None:
        body = {"prompt": tokens, "max_tokens": 8, "seed": 1}
        first, *_ = await answers(home, [body | {"prompt_logprobs": 1, "logprobs": 1}])
        plain = await answers(home, [body] * 3)
        again = await answers(home, [body | {"prompt_logprobs": 1, "logprobs": 1}] * 3)
        assert again == [first] * 3
        assert {choices[0]["text"] for choices in plain} == {first[0]["text"]}

    asyncio.run(run())


def test_what_was_generated_has_the_same_as_a_prompt(home: Cluster) -> None:
    """To the last bit: drawn token by token in one case, scored in chunks in the other."""
    tokens = [300 + at * 29 % 1500 for at in range(333)]

    async def run() -> None:
        body = {"prompt": tokens, "max_tokens": 90, "seed": 5, "temperature": 0.8, "logprobs": 2}
        ((said,),) = await answers(home, [body | {"return_token_ids": True}])
        whole = [*tokens, *said["token_ids"]]
        ((read,),) = await answers(home, [{"prompt": whole, "max_tokens": 0, "echo": True, "logprobs": 2}])
        count = len(said["token_ids"])
        assert count > 20
        assert read["logprobs"]["token_logprobs"][-count:] == said["logprobs"]["token_logprobs"]
        assert read["logprobs"]["top_logprobs"][-count:] == said["logprobs"]["top_logprobs"]

    asyncio.run(run())
