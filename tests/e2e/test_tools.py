"""Calls that a grammar holds to their schema, streamed: the same whoever dies, a node or the client's gateway."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest

import dataplane.demo
from tests.e2e.cluster import Cluster, until
from tests.web.gateway.scripted import QWEN, Joined, joined

CHAT = "/v1/chat/completions"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 20, "maxLength": 60},
        "guests": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
            "minItems": 2,
            "maxItems": 6,
        },
    },
    "required": ["title", "guests"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "invite", "parameters": PARAMETERS}}]
STREAMS, TOKENS = 12, 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of the demo model, with a template that knows of tools and reasoning."""
    folder = tmp_path_factory.mktemp("model") / "kevlar-demo"
    shutil.copytree(dataplane.demo.model_dir(), folder)
    (folder / "chat_template.jinja").write_text(QWEN)
    with Cluster(model=str(folder), gateways=2) as running:
        yield running


def request(number: int) -> dict[str, Any]:
    """Every third may reason first, as long as it likes; the others call a function at once."""
    return {
        "model": "kevlar-demo",
        "messages": [{"role": "user", "content": f"A ball in house {number}"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "enable_thinking": number % 3 == 0,
        "seed": number,
        "temperature": 1.0,
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Client:
    """Reads one stream to its end, at another gateway when the first one is gone."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self._urls = cluster.local.endpoints.gateways
        self._key = {"authorization": f"Bearer {cluster.local.api_key}"}
        self._number = number
        self.events: list[tuple[str, str]] = []
        self.gateways = 0

    async def run(self) -> Joined:
        while not (self.events and self.events[-1][1] == "[DONE]"):
            url = self._urls[self.gateways % len(self._urls)]
            self.gateways += 1
            assert self.gateways < 20
            try:
                async with httpx.AsyncClient(
                    base_url=url, headers=self._key, timeout=30, trust_env=False, verify=False
                ) as http:
                    await self._read(http)
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        return joined(self.events)

    async def _read(self, http: httpx.AsyncClient) -> None:
        headers = {"last-event-id": self.events[-1][0]} if self.events else {}
        last_id = ""
        async with http.stream("POST", CHAT, json=request(self._number), headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    last_id = line[4:]
                elif line.startswith("data: "):
                    self.events.append((last_id, line[6:]))


async def run_all(cluster: Cluster, victim: str = "", events: int = 0) -> tuple[list[Joined], list[Client]]:
    clients = [Client(cluster, number) for number in range(STREAMS)]

    async def kill() -> None:
        await until(lambda: sum(len(c.events) for c in clients) >= events * STREAMS, f"{events} events each")
        cluster.kill(victim)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client.run()) for client in clients]
        if victim:
            group.create_task(kill())
    return [task.result() for task in tasks], clients


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[Joined]:
    return asyncio.run(run_all(cluster))[0]


def test_calls_keep_to_their_schema(undisturbed: list[Joined]) -> None:
    ended = 0
    for answer in undisturbed:
        choice = answer.choices[0]
        assert choice.text == ""
        assert choice.finish in (["tool_calls"], ["length"])
        if choice.finish == ["tool_calls"]:
            ended += 1
            assert choice.names == ["invite"]
            jsonschema_rs.validate(PARAMETERS, json.loads(choice.arguments[0]))
    assert ended >= STREAMS // 2


@pytest.mark.parametrize(("victim", "events"), [("n3", 3), ("n7", 20), ("n0", 35), ("n2", 60)])
def test_a_node_dies(cluster: Cluster, undisturbed: list[Joined], victim: str, events: int) -> None:
    """Of the last stage, which follows the grammar, of the first, and of one between."""
    answers, _ = asyncio.run(run_all(cluster, victim, events))
    assert answers == undisturbed
    asyncio.run(cluster.wait_all_home())


@pytest.mark.parametrize("events", [2, 25, 50])
def test_a_gateway_dies(cluster: Cluster, undisturbed: list[Joined], events: int) -> None:
    answers, clients = asyncio.run(run_all(cluster, "g1", events))
    assert max(client.gateways for client in clients) > 1
    assert answers == undisturbed
