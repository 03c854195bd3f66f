"""Clients that cut their streams at random and go on at the other gateway, while schedulers move, forget and break."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from tests.web.gateway.fake_node import reference
from tests.web.gateway.stack import MODEL, Stack, beside, running
from tests.web.gateway.test_resume import CHAT, COMPLETIONS, Event, merged, read, stream_of
from web.gateway.routing.policy import Policy

STREAMS, TOKENS = 8, 150


async def follow(clients: list[httpx.AsyncClient], number: int, draw: random.Random) -> list[Event]:
    """One stream to its end, over as many connections as it takes."""
    asked = {"model": MODEL, "stream": True, "n": 2, "seed": number, "max_tokens": TOKENS, "logprobs": 1}
    path, asked = COMPLETIONS, asked | {"prompt": [400, number], "return_token_ids": True}
    if number % 2:
        path, asked = CHAT, asked | {"messages": [{"role": "user", "content": f"Number {number}"}]}
        asked = {k: v for k, v in asked.items() if k != "prompt"} | {"logprobs": True}
    events = await read(draw.choice(clients), "POST", path, asked, limit=draw.randrange(1, 30))
    while events[-1][1] != "[DONE]":
        last, client, limit = events[-1][0], draw.choice(clients), draw.randrange(1, 60)
        if draw.random() < 0.3:
            answer = await client.get(f"{stream_of(last)}x", headers={"last-event-id": last})
            assert answer.status_code == 400
        events += await read(client, "POST", path, asked, last_event_id=last, limit=limit)
    return events


async def trouble(one: Stack, two: Stack, draw: random.Random) -> None:
    while True:
        await asyncio.sleep(draw.random() * 0.1)
        match draw.randrange(4):
            case 0:
                places = {name: draw.randrange(3) for name in ("p0", "p1")}
                one.place(**places)
                two.counter = one.counter - 1
                two.place(**places)
            case 1:
                draw.choice(one.nodes).known.clear()
            case 2:
                draw.choice(one.nodes).break_streams()
            case 3:
                draw.choice(one.nodes).drop_next = draw.randrange(5)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_each_client_gets_its_stream_once(seed: int) -> None:
    async def run() -> None:
        draw = random.Random(seed)
        # Schedulers move here without a plan, which looks like the death of their nodes: nobody is at fault for it.
        policy = Policy(deaths_max=1000)
        async with running(3, policy=policy, burst=2) as one, beside(one) as two, asyncio.timeout(100):
            async with one.http() as first, two.http() as second:
                troubling = asyncio.create_task(trouble(one, two, draw))
                streams = [
                    asyncio.create_task(follow([first, second], number, draw)) for number in range(STREAMS)
                ]
                try:
                    found = await asyncio.gather(*streams)
                finally:
                    for task in (troubling, *streams):
                        task.cancel()
            for number, events in enumerate(found):
                got = merged(events)
                assert (len(got.ids), len(got.created), got.done) == (1, 1, 1)
                assert set(got.finish) == {0, 1}
                assert all(finish == [("length", None)] for finish in got.finish.values())
                assert all(len(logprobs) == TOKENS for logprobs in got.logprobs.values())
                if number % 2:
                    assert set(got.roles.values()) == {1}
                    continue
                for index in (0, 1):
                    want = reference((400, number), number + index, TOKENS)
                    assert got.tokens[index] == want
                    assert got.text[index] == one.service.model.decode(want)
            assert one.dispatcher.router.live == two.dispatcher.router.live == 0

    asyncio.run(run())
