"""What clients' requests keep: only what is needed to go on with them, and never more than was agreed."""

from __future__ import annotations

import asyncio
import gc
import json

from tests.web.gateway.stack import Events, Stack, stream, with_stack
from web.gateway.openai.generation import Generation
from web.gateway.openai.requests import ChatRequest, CompletionRequest
from web.gateway.request_memory import Memory

PAD = "x" * (3 << 20)
CHAT = "/v1/chat/completions"
BODIES: list[tuple[str, dict[str, object]]] = [
    ("/v1/completions", {"prompt": [400, 401], "user": PAD}),
    ("/v1/completions", {"prompt": [400, 401], "metadata": {"note": PAD}}),
    (CHAT, {"messages": [{"role": "user", "content": "Hello", "name": PAD}]}),
    (CHAT, {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": {"pad": PAD}}),
    (CHAT, {"messages": [{"role": "assistant", "content": "Hello", "reasoning_content": PAD}]}),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "tools": [{"type": "function", "function": {"name": "f", "description": PAD}}],
            "tool_choice": "none",
        },
    ),
]


def test_what_pads_a_body_is_kept_nowhere() -> None:
    async def body(stack: Stack) -> None:
        node = stack.nodes[0]
        node.held = True
        async with stack.http() as client:
            tasks = []
            for path, fields in BODIES:
                tasks.append(asyncio.create_task(stream(client, {**fields, "max_tokens": 4, "n": 2}, path)))
                await stack.until(lambda: len(node.running) == 2 * len(tasks))
            assert {len(s.submit.context or b"") < 1000 for s in node.running.values()} == {True}
            assert stack.service.memory.total < 1 << 20
            node.held = False
            events = await asyncio.gather(*tasks)
        assert all(e.done and not e.errors for e in events)
        await stack.until(lambda: stack.service.memory.total == 0)
        assert stack.service.memory.of(stack.keys_owner) == 0

    with_stack(body, nodes=1)


def test_a_client_over_its_share_is_told_to_wait_and_others_are_served() -> None:
    async def body(stack: Stack) -> None:
        node = stack.nodes[0]
        node.held = True
        memory = stack.service.memory = Memory(1 << 20, 0.5)
        memory.take(b"somebody else", 300_000)
        many = {"prompt": [400] * 2000, "max_tokens": 4}  # about 90 KB
        async with stack.http() as client:
            tasks = [asyncio.create_task(stream(client, many)) for _ in range(5)]
            await stack.until(lambda: len(node.running) == 5)
            refused: Events = await stream(client, many)
            assert refused.status == 429
            assert "this API key" in refused.errors[0]["message"]
            memory.take(b"somebody else", 100_000)  # there is room for others
            node.held = False
            assert all(e.done and not e.errors for e in await asyncio.gather(*tasks))
            assert (await stream(client, many)).done
            memory.take(b"a third", 500_000)
            memory.take(b"a fourth", 100_000)
            full = await stream(client, many)
            assert full.status == 503
            memory.give(b"a third", 500_000)
            large = await stream(client, {"prompt": "x" * 600_000, "max_tokens": 4})
            assert large.status == 413, "it would never have room"
        await stack.until(lambda: memory.of(stack.keys_owner) == 0)

    with_stack(body, nodes=1)


def test_bodies_that_are_on_their_way_count() -> None:
    async def body(stack: Stack) -> None:
        memory = stack.service.memory = Memory(8 << 20, 0.5)
        host, port = stack.url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-test\r\n"
        head += b"content-length: 3000000\r\n\r\n"
        lines = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + b" " * 1_500_000)
            lines.append((reader, writer))
        await stack.until(lambda: memory.total == 3_000_000)
        reader, writer = lines[0]
        writer.write(b" " * 1_400_000)
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
        assert answer.startswith(b"HTTP/1.1 429")
        for _, writer in lines:
            writer.close()
        await stack.until(lambda: memory.total == 0)

    with_stack(body, nodes=1)


def test_nobody_jumps_the_queue_unless_the_operator_says_so() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            refused = await stream(client, {"prompt": [400], "max_tokens": 2, "priority": -1})
            assert refused.status == 400
            assert "priority" in json.dumps(refused.errors)
            assert (await stream(client, {"prompt": [400], "max_tokens": 2, "priority": 7})).done
            stack.service.priority_floor = -1
            assert (await stream(client, {"prompt": [400], "max_tokens": 2, "priority": -1})).done
        assert [submit.priority for submit in stack.nodes[0].submits] == [7, -1]

    with_stack(body, nodes=1)


def test_what_is_held_is_given_back_with_the_object() -> None:
    memory = Memory(1000, 1.0)
    hold = memory.hold(b"a")
    hold.grow(600)
    hold.become(100)
    assert (memory.total, memory.of(b"a")) == (100, 100)
    del hold
    assert (memory.total, memory.of(b"a"), len(memory._of)) == (0, 0, 0)


def test_no_request_is_left_for_the_collector() -> None:
    """A request may be megabytes: nothing of one that is over is in a cycle, and the collector has little to do."""
    asks: list[tuple[str, dict[str, object]]] = [
        ("/v1/completions", {"prompt": [400, 401], "max_tokens": 3, "stream": True}),
        ("/v1/completions", {"prompt": [400, 401], "max_tokens": 3, "n": 2}),
        ("/v1/completions", {"prompt": [400, 401], "max_tokens": 3, "stop": ["e", "a"], "logprobs": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 3, "stream": True}),
        ("/v1/completions", {"prompt": [400, 401], "nonsense": 1}),
    ]

    async def body(stack: Stack) -> None:
        def alive() -> list[object]:
            # As nothing is collected; all others of a session take long to look at.
            mine = gc.get_objects(generation=0)
            return [o for o in mine if isinstance(o, (Generation, CompletionRequest, ChatRequest))]

        for path, ask in asks:
            async with stack.http() as client:
                for _ in range(3):
                    await client.post(path, json=ask)
            await stack.until(lambda: not alive())
        node = stack.nodes[0]
        node.held = True  # one whose client leaves
        async with stack.http() as client:
            request = client.build_request("POST", "/v1/completions", json=asks[0][1] | {"max_tokens": 500})
            reading = asyncio.create_task(client.send(request))
            await stack.until(lambda: node.running)
            reading.cancel()
            await asyncio.wait([reading])
        node.held = False
        await stack.until(lambda: not alive())

    gc.collect()
    gc.disable()
    try:
        with_stack(body, nodes=1)
    finally:
        gc.enable()
