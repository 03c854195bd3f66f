"""Gateways that die, stop and are replaced, under clients that follow: no token lost, doubled or different."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator, Sequence

import httpx
import pytest

from controlplane.contract.status import PipelineState
from controlplane.kfadmin.loadgen import LoadGenerator, Prompt, Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.e2e.test_structured import documents

STREAMS = 12
GATEWAYS = ("g1", "g2")


@pytest.fixture(scope="module")
def two(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(gateways=2) as running:
        yield running


@pytest.fixture
def cluster(two: Cluster) -> Iterator[Cluster]:
    yield two
    for name in [f"n{number}" for number in range(8)] + list(GATEWAYS):
        two.local.release(name)
    asyncio.run(serving(two))
    asyncio.run(two.wait_all_home(60.0))


def detailed(count: int, max_tokens: int) -> list[Prompt]:
    """Every second one with logprobs and usage."""
    prompts = sample_prompts(count, max_tokens)
    return [
        Prompt(p.text, p.seed, p.max_tokens, p.temperature, details=index % 2 == 1)
        for index, p in enumerate(prompts)
    ]


async def serving(cluster: Cluster) -> None:
    """Both gateways answer and reach every pipeline."""

    def ready(url: str) -> bool:
        try:
            answer = httpx.get(
                f"{url}/metrics", headers=key(cluster), timeout=2.0, trust_env=False, verify=False
            )
        except httpx.TransportError:
            return False
        return "kevlarflow_pipelines_reachable 2.0" in answer.text

    for url in cluster.local.endpoints.gateways:
        deadline = asyncio.get_running_loop().time() + 20.0
        while not await asyncio.to_thread(ready, url):
            assert asyncio.get_running_loop().time() < deadline, f"{url} does not serve\n{cluster.logs()}"
            await asyncio.sleep(0.05)


def key(cluster: Cluster) -> dict[str, str]:
    return {"authorization": f"Bearer {cluster.local.api_key}"}


def tokens_each(streams: Sequence[Stream], count: int) -> bool:
    return all(len(stream.tokens) >= count for stream in streams)


def starting_at(cluster: Cluster, gateway: int) -> LoadGenerator:
    urls = cluster.local.endpoints.gateways
    turned = urls[gateway:] + urls[:gateway]
    return LoadGenerator(turned[0], cluster.local.api_key, cluster.local.config.model_name, turned[1:])


def test_a_killed_gateway_costs_no_token(cluster: Cluster) -> None:
    prompts = detailed(STREAMS, 160)
    asyncio.run(cluster.references(prompts))
    asyncio.run(serving(cluster))

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: tokens_each(streams, 20), "20 tokens a stream")
        cluster.kill("g1")

    streams = asyncio.run(while_streaming(cluster, prompts, kill, starting_at(cluster, 0)))
    asyncio.run(cluster.expect_equal(streams))
    assert all(stream.resumes == 1 for stream in streams), [s.resumes for s in streams]


def test_a_gateway_killed_before_the_first_token(cluster: Cluster) -> None:
    """There is no event id yet: the request is sent again, and its Idempotency-Key finds the first one."""
    prompts = sample_prompts(4, 24, words=300)
    asyncio.run(cluster.references(prompts))
    asyncio.run(serving(cluster))

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: all(stream.sent for stream in streams), "every request is sent")
        cluster.kill("g1")

    streams = asyncio.run(while_streaming(cluster, prompts, kill, starting_at(cluster, 0)))
    asyncio.run(cluster.expect_equal(streams))


def test_a_stopped_gateway_hands_its_streams_over(cluster: Cluster) -> None:
    prompts = detailed(STREAMS, 160)
    asyncio.run(cluster.references(prompts))
    asyncio.run(serving(cluster))

    async def stop(streams: list[Stream]) -> None:
        await until(lambda: tokens_each(streams, 20), "20 tokens a stream")
        cluster.local.hold("g2")
        cluster.kill("g2", signal.SIGTERM)
        await until(lambda: "g2" not in cluster.local.pids(), "the gateway has ended", 5.0)

    streams = asyncio.run(while_streaming(cluster, prompts, stop, starting_at(cluster, 1)))
    asyncio.run(cluster.expect_equal(streams))
    assert all(stream.resumes == 1 for stream in streams)


@pytest.mark.parametrize("together", ["scheduler's node", "every node of a stage"])
def test_a_gateway_killed_together_with_nodes(cluster: Cluster, together: str) -> None:
    """Nobody has the logs any more but the clients: bodies are sent again, and prefixes computed again."""
    prompts = detailed(STREAMS, 160)
    asyncio.run(cluster.references(prompts))
    asyncio.run(serving(cluster))
    victims = ["n0"] if together == "scheduler's node" else ["n0", "n4"]

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: tokens_each(streams, 40), "40 tokens a stream")
        for name in ("g1", *victims):
            cluster.kill(name)

    streams = asyncio.run(while_streaming(cluster, prompts, kill, starting_at(cluster, 0)))
    asyncio.run(cluster.expect_equal(streams))
    assert all(stream.resumes for stream in streams)


def test_gateways_restarted_one_after_the_other_lose_nothing(cluster: Cluster) -> None:
    """Streams follow upon streams until both have been restarted, twice: by SIGTERM, and by SIGKILL."""
    prompts = detailed(STREAMS, 400)
    asyncio.run(cluster.references(prompts))
    asyncio.run(serving(cluster))
    over = asyncio.Event()
    streams: list[Stream] = []

    async def keep_streaming(client: httpx.AsyncClient, prompt: Prompt, gateway: int) -> None:
        while not over.is_set():
            streams.append(Stream(prompt))
            await starting_at(cluster, gateway).stream(client, prompt, streams[-1])

    async def run() -> None:
        async with cluster.generator.client() as client, asyncio.TaskGroup() as group:
            for index, prompt in enumerate(prompts):
                group.create_task(keep_streaming(client, prompt, index % 2))
            for number in (signal.SIGTERM, signal.SIGKILL):
                for name in GATEWAYS:
                    await restart(name, number)
            over.set()

    async def restart(name: str, number: int) -> None:
        before, begun = cluster.local.pids()[name], sum(stream.resumes for stream in streams)
        cluster.kill(name, number)
        await until(lambda: cluster.local.pids().get(name, before) != before, f"{name} is started again")
        await until(lambda: sum(stream.resumes for stream in streams) > begun, "clients have followed")
        await serving(cluster)

    asyncio.run(run())
    asyncio.run(cluster.expect_equal(streams))
    assert len(streams) >= STREAMS


def test_a_client_that_lost_its_connection_reads_on_with_a_get(cluster: Cluster) -> None:
    asyncio.run(serving(cluster))
    one, other = cluster.local.endpoints.gateways
    asked = {"model": cluster.local.config.model_name, "prompt": "The old", "max_tokens": 64, "seed": 4}
    asked["ignore_eos"] = True

    async def run() -> None:
        async with httpx.AsyncClient(headers=key(cluster), timeout=20, trust_env=False) as client:
            whole = (await client.post(f"{one}/v1/completions", json=asked)).json()
            data, last = await read(
                client, "POST", f"{one}/v1/completions", asked | {"stream": True}, limit=9
            )
            where = f"{other}/v1/streams/{last.partition('.')[0]}"
            rest, _ = await read(client, "GET", where, None, last_event_id=last)
            assert rest[-1] == "[DONE]"
            text = "".join(json.loads(d)["choices"][0]["text"] for d in data + rest[:-1])
            assert text == whole["choices"][0]["text"]

    asyncio.run(run())
    asyncio.run(
        cluster.wait_for(lambda s: all(p.state is PipelineState.UP for p in s.pipelines), "all serve")
    )


async def read(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    body: dict[str, object] | None,
    *,
    last_event_id: str = "",
    limit: int = 1 << 30,
) -> tuple[list[str], str]:
    """The data of up to `limit` events, then the connection is cut; and the last id."""
    data: list[str] = []
    headers = {"last-event-id": last_event_id} if last_event_id else {}
    last = last_event_id
    async with client.stream(method, url, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                last = line[4:]
            elif line.startswith("data: "):
                data.append(line[6:])
                if len(data) == limit:
                    break
    return data, last


def test_a_repeated_post_is_answered_once(cluster: Cluster) -> None:
    """At both gateways, also when one of them dies with it; without a seed, so that it cannot be the seed's work."""
    asyncio.run(serving(cluster))
    asked = {"model": cluster.local.config.model_name, "prompt": "A letter", "max_tokens": 48}
    asked["ignore_eos"] = True
    one, other = cluster.local.endpoints.gateways
    urls = [f"{one}/v1/completions", f"{other}/v1/completions"]

    async def run() -> None:
        headers = key(cluster) | {"idempotency-key": "once"}
        async with httpx.AsyncClient(headers=headers, timeout=20, trust_env=False) as client:
            first = (await client.post(urls[0], json=asked)).json()
            assert (await client.post(urls[1], json=asked)).json() == first
            assert (await client.post(urls[0], json=asked)).json() == first
            refused = await client.post(urls[1], json=asked | {"max_tokens": 47})
            assert refused.status_code == 422
            client.headers["idempotency-key"] = "twice"
            second = (await client.post(urls[0], json=asked)).json()
            assert second["choices"][0]["text"] != first["choices"][0]["text"]
            # The gateway that had it dies while it runs: the same key at the other one finds it.
            client.headers["idempotency-key"] = "killed"
            longer = asked | {"max_tokens": 900}
            lost = asyncio.create_task(client.post(urls[0], json=longer))
            while (await client.get(f"{one}/load")).json()["server_load"] == 0:
                assert not lost.done(), "it was answered before it could be lost"
            cluster.kill("g1")
            answer = (await client.post(urls[1], json=longer)).json()
            with pytest.raises(httpx.TransportError):
                (await lost).raise_for_status()
            assert (await client.post(urls[1], json=longer)).json() == answer

    asyncio.run(run())


@pytest.mark.parametrize("nodes", [(), ("n0", "n3")])
def test_documents_of_a_schema_go_on_at_another_gateway(cluster: Cluster, nodes: tuple[str, ...]) -> None:
    """With it, or with the last stage and the scheduler, all that knew where a document was in its grammar is gone."""
    prompts = documents(STREAMS, details=True)
    asyncio.run(cluster.references(prompts))
    asyncio.run(serving(cluster))

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: tokens_each(streams, 15), "15 tokens a stream")
        for name in ("g1", *nodes):
            cluster.kill(name)

    streams = asyncio.run(while_streaming(cluster, prompts, kill, starting_at(cluster, 0)))
    asyncio.run(cluster.expect_equal(streams))
    assert all(stream.resumes for stream in streams)
