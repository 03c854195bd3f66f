"""A gateway over real HTTP and real gRPC in one event loop; the topology is set by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

import dataplane.demo
from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from tests.web.gateway.fake_node import FakeNode
from web.gateway.http.api_keys import ApiKeys
from web.gateway.http.app import build_app
from web.gateway.http.server import GatewayServer, listen, make_server, stop
from web.gateway.metrics import Metrics
from web.gateway.model import Model, load_model
from web.gateway.resume.tickets import Tickets
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.routing.events import TopologySeen
from web.gateway.routing.policy import Policy
from web.gateway.service import Service
from web.gateway.services import Services

KEY = "sk-test"
MODEL = "kevlar-demo"


def demo_model(**engine: Any) -> Model:
    config = ClusterConfig(run_dir="/nonexistent", model=str(dataplane.demo.model_dir()), etcd=())
    return load_model(config)


@dataclass
class Stack:
    nodes: list[FakeNode]
    dispatcher: Dispatcher
    service: Service
    server: GatewayServer
    url: str
    services: Services
    serving: asyncio.Task[None] | None = None
    counter: int = 0
    mode: Mode = Mode.REPLICATE
    places: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def place(self, **places: int | None) -> None:
        """Write a topology: pipeline -> index of the node that schedules it; None: down. Others stay."""
        self.counter += 1
        for pipeline, node in places.items():
            self.places[pipeline] = None if node is None else (node, self.counter)
            for index, fake in enumerate(self.nodes):
                if index == node:
                    fake.epochs[pipeline] = self.counter
                else:
                    fake.epochs.pop(pipeline, None)
        pipelines = tuple(self._pipeline(name, place) for name, place in sorted(self.places.items()))
        self.dispatcher.feed(TopologySeen(Topology("default", self.counter, self.mode, pipelines)))

    def _pipeline(self, name: str, place: tuple[int, int] | None) -> Pipeline:
        if place is None:
            return Pipeline(name, self.counter, (Stage((f"{name}-home",)), Stage(("other",))))
        node, epoch = place
        head = Stage((f"{name}-home",), (self.nodes[node].member,))
        return Pipeline(name, epoch, (head, Stage(("other",), (Member("other", "x"),))))

    async def until(self, condition: Callable[[], Any], limit_s: float = 10.0) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, "the condition was not met in time"
            await asyncio.sleep(0.005)

    def openai(self) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(verify=False)  # no certificates, no authorities to read
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=20, http_client=http
        )

    def http(self, key: str = KEY) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20, verify=False)

    @property
    def keys_owner(self) -> bytes:
        return ApiKeys([KEY]).match(f"Bearer {KEY}").owner

    def stop(self, grace_s: float = 1.0) -> None:
        stop(self.server, self.dispatcher, grace_s)


@contextlib.asynccontextmanager
async def running(
    nodes: int = 2,
    policy: Policy | None = None,
    keep_alive_s: float = 5.0,
    model: Model | None = None,
    origins: tuple[str, ...] = (),
    keys: ApiKeys | None = None,
    **knobs: Any,
) -> AsyncIterator[Stack]:
    """`nodes` fake nodes, pipelines p0.. on the first two of them, and a gateway that is ready."""
    fakes = [FakeNode(Member(f"n{index}", f"i{index}"), **knobs) for index in range(nodes)]
    try:
        for fake in fakes:
            await fake.start()
        async with _gateway(fakes, policy, keep_alive_s, model, origins, keys) as stack:
            stack.place(**{f"p{index}": index for index in range(min(2, nodes))})
            await stack.until(lambda: stack.dispatcher.router.reachable == min(2, nodes))
            yield stack
    finally:
        for fake in fakes:
            await fake.stop()


def with_stack(body: Callable[[Stack], Awaitable[None]], limit_s: float = 20.0, **knobs: Any) -> None:
    async def run() -> None:
        async with running(**knobs) as stack, asyncio.timeout(limit_s):
            await body(stack)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def beside(stack: Stack) -> AsyncIterator[Stack]:
    """A second gateway of the same cluster, which sees the topology that the first one saw last."""
    async with _gateway(
        stack.nodes, stack.dispatcher.router.policy, stack.service.keep_alive_s, stack.service.model
    ) as other:
        other.places, other.counter = dict(stack.places), stack.counter
        topology = stack.dispatcher.router.topology
        assert topology is not None
        other.dispatcher.feed(TopologySeen(topology))
        await other.until(lambda: other.dispatcher.router.reachable == stack.dispatcher.router.reachable)
        yield other


@contextlib.asynccontextmanager
async def _gateway(
    fakes: list[FakeNode],
    policy: Policy | None,
    keep_alive_s: float,
    model: Model | None,
    origins: tuple[str, ...] = (),
    keys: ApiKeys | None = None,
) -> AsyncIterator[Stack]:
    metrics = Metrics()
    keys = keys or ApiKeys([KEY])
    dispatcher = Dispatcher(policy or Policy(), "t", metrics)
    metrics.attach(dispatcher.router, lambda: 0.0)
    metrics.attach_keys(keys.usages)
    service = Service(model or demo_model(), dispatcher, metrics, 1, lambda: 0.0, Tickets("s"), keep_alive_s)
    services = Services(service)
    server = make_server(build_app(services, keys, origins))
    sock = listen("127.0.0.1", 0)
    stack = Stack(fakes, dispatcher, service, server, f"http://127.0.0.1:{sock.getsockname()[1]}", services)
    try:
        for fake in fakes:
            dispatcher.locate(fake.member, fake.address)
        stack.serving = asyncio.create_task(server.serve(sockets=[sock]))
        await stack.until(lambda: server.started)
        yield stack
    finally:
        stack.stop()
        if stack.serving is not None:
            async with asyncio.timeout(10):
                await stack.serving
        await dispatcher.aclose()


@dataclass
class Events:
    """A stream as it came over the wire."""

    status: int = 0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    comments: int = 0
    done: bool = False
    last_id: str = ""
    fields: list[str] = field(default_factory=list)  # "event: ..." and "retry: ..."
    headers: dict[str, str] = field(default_factory=dict)

    def ids(self, index: int = 0) -> list[int]:
        return [
            t
            for c in self.chunks
            for x in c["choices"]
            if x["index"] == index
            for t in x.get("token_ids", [])
        ]

    def text(self, index: int = 0) -> str:
        found = [x for c in self.chunks for x in c["choices"] if x["index"] == index]
        return "".join(x["text"] if "text" in x else x["delta"].get("content", "") for x in found)

    def finish(self, index: int = 0) -> str | None:
        found = [x["finish_reason"] for c in self.chunks for x in c["choices"] if x["index"] == index]
        return found[-1] if found else None


async def stream(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    path: str = "/v1/completions",
    into: Events | None = None,
) -> Events:
    """Read one stream to its end; whatever follows [DONE] is an error."""
    events = into or Events()
    body = {"model": MODEL, "stream": True, **body}
    async with client.stream("POST", path, json=body) as response:
        events.status = response.status_code
        events.headers = dict(response.headers)
        if response.status_code != 200:
            events.errors.append(json.loads(await response.aread())["error"])
            return events
        async for line in response.aiter_lines():
            if not line:
                continue
            assert not events.done, "something after [DONE]"
            if line.startswith(":"):
                events.comments += 1
            elif line.startswith("id: "):
                events.last_id = line.removeprefix("id: ")
            elif line.startswith(("event: ", "retry: ")):
                events.fields.append(line)
            elif line == "data: [DONE]":
                events.done = True
            else:
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    events.errors.append(data["error"])
                else:
                    events.chunks.append(data)
    return events
