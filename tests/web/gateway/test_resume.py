"""Streams that are cut and go on elsewhere, requests that are repeated: nothing twice, nothing missing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import httpx
import msgspec
import openai
import pytest

from controlplane.contract.requests import Submit
from tests.web.gateway.fake_node import reference
from tests.web.gateway.stack import MODEL, Stack, beside, demo_model, running
from web.gateway.errors import OTHER_BODY
from web.gateway.resume.cursor import Cursor
from web.gateway.resume.tickets import Tickets, rid_of
from web.gateway.text.template import ChatTemplate

PROMPT = [400, 401, 402]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Event = tuple[str, str]  # id, data

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "all of it": (
        COMPLETIONS,
        {
            "prompt": PROMPT,
            "max_tokens": 12,
            "logprobs": 2,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "echo and a stop string": (
        COMPLETIONS,
        {
            "prompt": "The old house",
            "max_tokens": 40,
            "echo": True,
            "seed": 3,
            "stop": ["pretty", "aghenst", "lave hasli"],  # two are held back for a while, the last one is met
        },
    ),
    "two prompts, two choices": (
        COMPLETIONS,
        {
            "prompt": [PROMPT, [500, 501]],
            "n": 2,
            "max_tokens": 6,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "chat": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "n": 2,
            "max_tokens": 8,
            "logprobs": True,
            "top_logprobs": 1,
            "stream_options": {"include_usage": True},
        },
    ),
}


@dataclass
class Merged:
    """What a client has in hand, however it was cut into events."""

    ids: set[str] = field(default_factory=set)
    created: set[int] = field(default_factory=set)
    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    prompts: dict[int, list[Any]] = field(default_factory=dict)
    roles: dict[int, int] = field(default_factory=dict)
    finish: dict[int, list[Any]] = field(default_factory=dict)
    usage: list[Any] = field(default_factory=list)
    done: int = 0

    def add(self, data: str) -> None:
        if data == "[DONE]":
            self.done += 1
            return
        chunk = json.loads(data)
        assert "error" not in chunk, chunk
        self.ids.add(chunk["id"])
        self.created.add(chunk["created"])
        if not chunk["choices"]:
            self.usage.append(chunk["usage"])
        for choice in chunk["choices"]:
            index = choice["index"]
            delta = choice.get("delta", {})
            self.text[index] = self.text.get(index, "") + (choice.get("text") or delta.get("content") or "")
            self.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
            self.roles[index] = self.roles.get(index, 0) + ("role" in delta)
            if choice.get("prompt_token_ids"):
                self.prompts.setdefault(index, []).append(choice["prompt_token_ids"])
            if (logprobs := choice["logprobs"]) is not None:
                lists = logprobs.values() if "tokens" in logprobs else [logprobs["content"]]
                rows = list(zip(*lists, strict=True))
                self.logprobs.setdefault(index, []).extend(rows)
            if choice["finish_reason"] is not None:
                self.finish.setdefault(index, []).append((choice["finish_reason"], choice["stop_reason"]))


def merged(events: list[Event]) -> Merged:
    made = Merged()
    for _, data in events:
        made.add(data)
    return made


async def read(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    last_event_id: str = "",
    key: str = "",
    limit: int = 10_000,
    on_event: Callable[[list[Event]], None] = lambda _: None,
) -> list[Event]:
    """Up to `limit` whole events; then the connection is cut."""
    headers = {"last-event-id": last_event_id} if last_event_id else {}
    if key:
        headers["idempotency-key"] = key
    events: list[Event] = []
    last_id, data = "", ""
    async with client.stream(method, path, json=body, headers=headers) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                last_id = line[4:]
            elif line.startswith("data: "):
                data = line[6:]
            elif not line and data:
                events.append((last_id, data))
                on_event(events)
                data = ""
                if len(events) == limit:
                    break
    return events


def request(kind: str) -> tuple[str, dict[str, Any]]:
    path, body = BODIES[kind]
    return path, {"model": MODEL, "stream": True, **body}


def with_two(body: Callable[[Stack, Stack], Awaitable[None]], **knobs: Any) -> None:
    async def run() -> None:
        async with running(burst=2, **knobs) as one, beside(one) as two, asyncio.timeout(60):
            await body(one, two)

    asyncio.run(run())


def stream_of(event_id: str) -> str:
    return f"/v1/streams/{event_id.partition('.')[0]}"


@pytest.mark.parametrize("way", ["post", "get", "forgotten"])
@pytest.mark.parametrize("kind", BODIES)
def test_cut_anywhere_a_stream_goes_on_at_another_gateway(kind: str, way: str) -> None:
    async def body(one: Stack, two: Stack) -> None:
        path, asked = request(kind)
        async with one.http() as first, two.http() as second:
            cut = 1
            while True:
                events = await read(first, "POST", path, asked, limit=cut)
                if events[-1][1] == "[DONE]":
                    break
                last = events[-1][0]
                if way == "forgotten":
                    for node in one.nodes:
                        node.known.clear()
                        node.running.clear()
                if way == "get":
                    rest = await read(second, "GET", stream_of(last), last_event_id=last)
                else:
                    rest = await read(second, "POST", path, asked, last_event_id=last)
                # Whatever the second gateway's cuts are, once more from the start of the same stream.
                whole = await read(first, "POST", path, asked, last_event_id=last.partition(".")[0])
                assert merged(events + rest) == merged(whole), f"cut after {cut}"
                assert all(len(v) == 1 for v in merged(whole).finish.values())
                assert len(rest) > 0
                assert rest[-1] == (rest[-1][0], "[DONE]")
                cut += 1
            assert cut > 6

    with_two(body)


def test_cut_again_and_again() -> None:
    """Three events at each gateway in turn, to the end."""

    async def body(one: Stack, two: Stack) -> None:
        path, asked = request("two prompts, two choices")
        async with one.http() as first, two.http() as second:
            events = await read(first, "POST", path, asked, limit=3)
            turn = 0
            while events[-1][1] != "[DONE]":
                client = (second, first)[turn % 2]
                events += await read(client, "POST", path, asked, last_event_id=events[-1][0], limit=3)
                turn += 1
            assert turn > 2
            assert merged(events) == merged(await read(first, "GET", stream_of(events[0][0])))

    with_two(body)


def test_a_running_stream_is_taken_over_and_not_computed_again() -> None:
    """The old connection is still open: it ends with an explicit error, and its end cancels nothing."""

    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "seed": 1, "max_tokens": 300, "stream": True}
        seen: list[Event] = []
        async with one.http() as first, two.http() as second, one.http() as third:
            old = asyncio.create_task(
                read(first, "POST", COMPLETIONS, asked, on_event=lambda events: seen.__init__(events))  # type: ignore[misc]
            )
            await one.until(lambda: len(seen) > 5)
            rest = await read(second, "POST", COMPLETIONS, asked, last_event_id=seen[3][0], limit=20)
            events = await old
            error = json.loads(events[-2][1])["error"]
            assert (error["code"], error["type"], events[-1][1]) == (409, "ConflictError", "[DONE]")
            assert not any(s.emitted == () for node in one.nodes for s in node.submits[1:])
            # The same at one gateway.
            rest += await read(third, "POST", COMPLETIONS, asked, last_event_id=rest[-1][0])
            text = merged(seen[:4] + rest).text[0]
            assert text == one.service.model.decode(reference(tuple(PROMPT), 1, 300))

    with_two(body)


@pytest.mark.parametrize("ahead", [False, True])
def test_whoever_could_not_be_told_of_the_last_connection_comes_after_it_all_the_same(ahead: bool) -> None:
    """That one is still open. The search finds nothing, as when its scheduler cannot be reached meanwhile. `ahead`: the
    clock of the other gateway is, by an hour."""

    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "seed": 1, "max_tokens": 300, "stream": True}
        seen: list[Event] = []
        async with one.http() as first, two.http() as second:
            events = await read(first, "POST", COMPLETIONS, asked, limit=4)
            events += await read(second, "POST", COMPLETIONS, asked, last_event_id=events[-1][0], limit=4)
            last = events[-1][0]
            old = asyncio.create_task(
                read(
                    second,
                    "POST",
                    COMPLETIONS,
                    asked,
                    last_event_id=last,
                    on_event=lambda events: seen.__init__(events),  # type: ignore[misc]
                )
            )
            await one.until(lambda: len(seen) > 2)
            (node,) = one.nodes
            node.known.clear()
            if ahead:
                (run,) = node.running.values()
                reader = run.submit.reader + 3600 * 10**6
                run.submit = msgspec.structs.replace(run.submit, reader=reader)
            rest = await read(first, "POST", COMPLETIONS, asked, last_event_id=last)
            error = json.loads((await old)[-2][1])["error"]
            assert (error["code"], error["type"]) == (409, "ConflictError")
            # What was on its way to an earlier connection may make the next one at that gateway ask twice.
            readers = [reader for reader, _ in groupby(submit.reader for submit in node.submits)]
            assert readers[:3] == sorted(set(readers[:3]))
            if ahead:
                assert len(readers) == 5
                assert readers[4] == reader + 1 > reader > readers[3]
            else:
                assert len(readers) == 4
                assert readers[3] > readers[2]
            assert one.dispatcher.router.counts["overtaken"] == ahead
            text = merged(events + rest).text[0]
            assert text == one.service.model.decode(reference(tuple(PROMPT), 1, 300))
            assert one.dispatcher.router.live == two.dispatcher.router.live == 0

    with_two(body, nodes=1)  # so that it comes to the scheduler that knows


def test_who_came_last_reads_on_where_every_scheduler_has_forgotten_the_stream() -> None:
    """The earlier connection is still open at the other gateway, and has taken the stream up once more than it knows.
    Then the streams of both gateways break, and whoever comes last to the scheduler is chance."""

    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "seed": 1, "max_tokens": 300, "stream": True}
        seen: list[Event] = []
        more: list[Event] = []
        (node,) = one.nodes
        node.step_s = 0.005

        def follow(client: httpx.AsyncClient, last: str, into: list[Event]) -> asyncio.Task[list[Event]]:
            def note(events: list[Event]) -> None:
                into[:] = events

            return asyncio.create_task(
                read(client, "POST", COMPLETIONS, asked, last_event_id=last, on_event=note)
            )

        async with one.http() as first, two.http() as second:
            events = await read(first, "POST", COMPLETIONS, asked, limit=4)
            events += await read(second, "POST", COMPLETIONS, asked, last_event_id=events[-1][0], limit=4)
            last = events[-1][0]
            old = follow(second, last, seen)
            await one.until(lambda: len(seen) > 2)
            node.known.clear()
            node.running.clear()
            new = follow(first, last, more)
            await one.until(lambda: len(more) > 2)
            node.break_streams()
            text = merged(events + await new).text[0]
            assert text == one.service.model.decode(reference(tuple(PROMPT), 1, 300))
            error = json.loads((await old)[-2][1])["error"]
            assert (error["code"], error["type"]) == (409, "ConflictError")

    with_two(body, nodes=1)


def test_an_empty_event_id_says_that_nothing_has_come() -> None:
    async def body(one: Stack, two: Stack) -> None:
        path, asked = request("all of it")
        async with one.http() as client:
            answer = await client.post(path, json=asked, headers={"last-event-id": ""})
            assert (answer.status_code, answer.text.count("[DONE]")) == (200, 1)

    with_two(body)


def test_ids_of_others_and_nonsense() -> None:
    async def body(one: Stack, two: Stack) -> None:
        path, asked = request("all of it")
        async with one.http() as client:
            good = (await read(client, "POST", path, asked, limit=4))[-1][0]
            ticket, _, cursor = good.partition(".")
            tampered = ticket[:-6] + ("A" if ticket[-6] != "A" else "B") + ticket[-5:]
            foreign = Tickets("s").issue(bytes(16), 1, bytes(8), b"someone else").text
            other_cluster = Tickets("other").issue(bytes(16), 1, bytes(8), bytes(32)).text

            async def status(method: str, where: str, last: str, **changes: Any) -> tuple[int, str]:
                sent = (asked | changes) if method == "POST" else None
                answer = await client.request(method, where, json=sent, headers={"last-event-id": last})
                return answer.status_code, answer.json()["error"]["message"]

            for method, where in (("POST", path), ("GET", f"/v1/streams/{ticket}")):
                assert (await status(method, where, f"{tampered}.{cursor}"))[0] == 404
                assert (await status(method, where, f"{other_cluster}.{cursor}"))[0] == 404
                assert (await status(method, where, "nonsense"))[0] == 404
                assert (await status(method, where, f"{foreign}.{cursor}"))[0] == 403
                assert (await status(method, where, f"{ticket}.1-2"))[0] == 400
                assert (await status(method, where, f"{ticket}.13f"))[0] == 400
                assert (await status(method, where, f"{ticket}.12"))[0] == 400
                assert (await status(method, where, f"{ticket}.x"))[0] == 400
            assert (await status("POST", path, good, max_tokens=13))[0] == 422
            assert (await status("POST", path, good, prompt=[1]))[0] == 422
            assert (await status("POST", path, good, stream=False, stream_options=None))[0] == 400
            another = Tickets("s").issue(bytes(16), 1, bytes(8), one.keys_owner)
            assert (await status("GET", f"/v1/streams/{ticket}", f"{another.text}.1"))[0] == 400
            assert (await client.get(f"/v1/streams/{another.text}")).status_code == 410
            for node in one.nodes:
                node.known.clear()
            gone, text = await status("GET", f"/v1/streams/{ticket}", good)
            assert gone == 410
            assert "POST the same body" in text
            one.place(p0=None)  # and now a scheduler that does not answer: it may be there
            await one.nodes[1].stop()
            assert (await status("GET", f"/v1/streams/{ticket}", good))[0] == 503

    with_two(body)


def test_a_repeated_request_is_computed_once() -> None:
    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "n": 2}
        headers = {"idempotency-key": "order-1"}
        async with one.http() as first, two.http() as second:
            answer = (await first.post(COMPLETIONS, json=asked, headers=headers)).json()
            computed = sum(len(node.submits) for node in one.nodes)
            again = (await second.post(COMPLETIONS, json=asked, headers=headers)).json()
            assert again == answer
            assert computed == 2
            assert sum(len(node.submits) for node in one.nodes) == 4
            assert (
                sorted(s.admitted for node in one.nodes for s in node.submits) == [False] * 2 + [True] * 2
            ), "attached, not new"
            other = await second.post(COMPLETIONS, json=asked | {"max_tokens": 21}, headers=headers)
            assert other.status_code == 422
            assert other.json()["error"]["type"] == "UnprocessableEntityError"
            # Nobody remembers it: it is computed again, and is the same but for its time.
            for node in one.nodes:
                node.known.clear()
            third = (await second.post(COMPLETIONS, json=asked, headers=headers)).json()
            assert third | {"created": 0} == answer | {"created": 0}
            for bad in ("", "x" * 256, "caf\u00e9"):
                refused = await first.post(COMPLETIONS, json=asked, headers={"idempotency-key": bad.encode()})
                assert refused.status_code == 400

    with_two(body)


@pytest.mark.parametrize("when", ["at once", "running", "in one piece"])
def test_another_body_under_one_key_disturbs_nothing(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "stream": when != "in one piece"}
        headers = {"idempotency-key": "k"}
        async with one.http() as client:
            if when == "at once":  # neither search finds anything

                async def nothing(rid: int, limit_s: float) -> tuple[None, bool]:
                    await asyncio.sleep(0.01)
                    return None, True

                monkeypatch.setattr(one.dispatcher, "recall", nothing)
            first = asyncio.create_task(client.post(COMPLETIONS, json=asked, headers=headers))
            await asyncio.sleep(0)
            if when != "at once":
                await one.until(lambda: one.dispatcher.router.live)
            for other in (
                {"max_tokens": 9},
                {"prompt": [1, 2]},
                {"stop": "x"},
                {"stream": not asked["stream"]},
            ):
                answer = await client.post(COMPLETIONS, json=asked | other, headers=headers)
                assert (answer.status_code, answer.json()["error"]["message"]) == (422, OTHER_BODY), other
            whole = await first
            assert whole.status_code == 200
            assert "error" not in whole.text
            assert len({submit.rid for node in one.nodes for submit in node.submits}) == 1

    with_two(body)


def test_a_repeated_request_goes_on_with_the_prompt_that_its_scheduler_has() -> None:
    """A template may have put another date into it since."""

    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9}
        headers = {"idempotency-key": "k"}
        async with one.http() as first, two.http() as second:
            assert (await first.post(COMPLETIONS, json=asked, headers=headers)).status_code == 200
            (known,) = [run for node in one.nodes for run in node.known.values()]
            known.submit = msgspec.structs.replace(known.submit, prompt=(7, *PROMPT))
            assert (await second.post(COMPLETIONS, json=asked, headers=headers)).status_code == 200
            submits = sorted((s for node in one.nodes for s in node.submits), key=lambda s: s.reader)
            assert [s.prompt for s in submits[1:]] == [(7, *PROMPT)]

    with_two(body)


def test_a_repeated_stream_is_joined_from_its_start() -> None:
    async def body(one: Stack, two: Stack) -> None:
        path, asked = request("chat")
        async with one.http() as first, two.http() as second:
            events = await read(first, "POST", path, asked, key="k", limit=4)
            whole = await read(second, "POST", path, asked, key="k")
            assert merged(whole) == merged(await read(first, "GET", stream_of(events[0][0])))
            assert merged(events).ids == merged(whole).ids

    with_two(body)


def test_an_event_id_with_many_choices_is_searched_for_by_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What schedulers have of that says how many there are."""

    async def body(one: Stack, two: Stack) -> None:
        asked: list[int] = []
        recall = two.dispatcher.recall

        async def noted(rid: int, limit_s: float) -> Any:
            asked.append(rid)
            return await recall(rid, limit_s)

        monkeypatch.setattr(two.dispatcher, "recall", noted)
        path, sent = request("all of it")
        async with one.http() as first, two.http() as second:
            last = (await read(first, "POST", path, sent, limit=4))[-1][0].partition(".")[0]
            for cursor, searches in ((f"{'-' * 2046}", 0), ("-" * 127, 1)):
                headers = {"last-event-id": f"{last}.{cursor}"}
                answer = await second.get(stream_of(last), headers=headers)
                assert (answer.status_code, len(asked)) == (400, searches)

    with_two(body)


def test_what_a_client_has_all_of_is_needed_no_more() -> None:
    """The first prompt ended long ago, and no scheduler has it: the others go on without a body."""

    async def body(one: Stack, two: Stack) -> None:
        path, asked = request("two prompts, two choices")
        owner = one.keys_owner
        dropped = 0
        async with one.http() as first, two.http() as second:
            whole = await read(first, "POST", path, asked)
            for cut in range(1, len(whole) - 1):
                events = await read(first, "POST", path, asked, limit=cut)
                ticket, _, cursor = events[-1][0].partition(".")
                nonce = one.service.tickets.read(ticket, owner).nonce
                ended = [at for at, mark in enumerate(Cursor.parse(cursor).marks) if mark and mark.finished]
                if len(ended) < 4:
                    for rid in (rid_of(nonce, at) for at in ended):
                        dropped += any(node.known.pop(rid, None) is not None for node in one.nodes)
                rest = await read(second, "GET", f"/v1/streams/{ticket}", last_event_id=events[-1][0])
                whole = await read(first, "POST", path, asked, last_event_id=ticket)
                assert merged(events + rest) == merged(whole), f"cut after {cut}"
        assert dropped > 2

    with_two(body, speak=ends_early)


def ends_early(submit: Submit, position: int) -> int:
    """The first prompt ends after one token."""
    if submit.prompt == tuple(PROMPT) and position == 1:
        return submit.sampling.stop_token_ids[0]
    return reference(submit.prompt, submit.sampling.seed, position + 1)[-1]


def test_a_prompt_tells_one_time_whatever_the_zone_of_the_gateways_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M') }}", {}, 1000)
    try:
        for zone in ("UTC", "Asia/Tokyo", "XYZ+8"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert template.render([], now_unix_s=1_796_000_000) == "2026-11-30 00:53"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_prompt_tells_the_day_on_which_its_stream_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """After midnight the same body is the same prompt, whether nobody remembers it or somebody does."""
    template = ChatTemplate("{{ strftime_now('%d.%m.%Y %H:%M:%S') }} {{ messages[0].content }}", {}, 1000)

    async def body(stack: Stack) -> None:
        path, asked = request("chat")
        plain = asked | {"stream": False, "stream_options": None}
        async with stack.http() as client:
            for forgotten in (False, True):
                now = clock[0]
                events = await read(client, "POST", path, asked, limit=5)
                kept = await client.post(path, json=plain, headers={"idempotency-key": f"{forgotten}"})
                clock[0] += 86_400
                assert stack.service.model.decode(list(stack.nodes[0].submits[-1].prompt)).endswith(
                    datetime.fromtimestamp(now, UTC).strftime("%d.%m.%Y %H:%M:%S Hello")
                )
                again = await client.post(path, json=plain, headers={"idempotency-key": f"{forgotten}"})
                assert (again.status_code, again.json()) == (200, kept.json())
                if forgotten:
                    stack.nodes[0].known.clear()
                    stack.nodes[0].running.clear()
                rest = await read(client, "POST", path, asked, last_event_id=events[-1][0])
                whole = await read(client, "GET", stream_of(events[0][0]))
                assert merged(events + rest) == merged(whole)

    clock = [time.time()]
    monkeypatch.setattr("web.gateway.resume.start_or_resume.time.time", lambda: clock[0])
    model = replace(demo_model(), template=template)

    async def run() -> None:
        async with running(burst=2, nodes=1, model=model) as stack, asyncio.timeout(60):
            await body(stack)

    asyncio.run(run())


def test_a_stop_lets_plain_answers_finish_and_hands_streams_over() -> None:
    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "seed": 1, "max_tokens": 200}
        seen: list[Event] = []
        async with one.http() as first, one.http() as plain, two.http() as second:
            answer = asyncio.create_task(plain.post(COMPLETIONS, json=asked | {"return_token_ids": True}))
            stream = asyncio.create_task(
                read(
                    first,
                    "POST",
                    COMPLETIONS,
                    asked | {"stream": True},
                    on_event=lambda events: seen.__init__(events),  # type: ignore[misc]
                )
            )
            await one.until(lambda: len(seen) > 5)
            one.stop()
            events = await stream
            assert json.loads(events.pop()[1])["error"]["code"] == 503
            rest = await read(
                second, "POST", COMPLETIONS, asked | {"stream": True}, last_event_id=events[-1][0]
            )
            want = reference(tuple(PROMPT), 1, 200)
            assert merged(events + rest).text[0] == one.service.model.decode(want)
            assert (await answer).json()["choices"][0]["token_ids"] == want
            assert not any(node.cancels for node in one.nodes)

    with_two(body)


def test_a_stop_ends_plain_answers_after_the_grace() -> None:
    async def body(one: Stack, two: Stack) -> None:
        for node in one.nodes:
            node.held = True
        async with one.http() as client:
            asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9}
            plain = asyncio.create_task(client.post(COMPLETIONS, json=asked))
            stream = asyncio.create_task(client.post(COMPLETIONS, json=asked | {"stream": True}))
            await one.until(lambda: sum(len(node.running) for node in one.nodes) == 2)
            one.stop(0.3)
            for answer in await asyncio.gather(plain, stream):
                # A stream that has brought nothing is simply asked for again.
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
            assert one.serving is not None
            async with asyncio.timeout(3):
                await one.serving

    with_two(body)


def test_the_openai_client_reads_over_keep_alives_and_is_told_of_a_stop() -> None:
    async def body(one: Stack, two: Stack) -> None:
        stream = await one.openai().completions.create(
            model=MODEL, prompt="Hello", seed=1, max_tokens=400, stream=True
        )
        loop = asyncio.get_running_loop()
        pieces: list[str] = []

        async def read_all() -> None:
            async for chunk in stream:
                pieces.append(chunk.choices[0].text)
                if len(pieces) == 5:  # now a pause: its keep-alives come after events with ids
                    hold(one, True)
                    loop.call_later(0.3, hold, one, False)
                if len(pieces) == 10:
                    one.stop()

        with pytest.raises(openai.APIError, match="shutting down"):
            await read_all()
        assert len(pieces) >= 10

    def hold(one: Stack, held: bool) -> None:
        for node in one.nodes:
            node.held = held

    with_two(body, keep_alive_s=0.05)


def test_a_long_prefix_that_is_computed_again_is_not_silent() -> None:
    async def body(one: Stack, two: Stack) -> None:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "stream": True}
        async with one.http() as first, two.http() as second:
            events = await read(first, "POST", COMPLETIONS, asked, limit=20)
            for node in one.nodes:
                node.known.clear()
                node.step_s = 0.02
            headers = {"last-event-id": events[-1][0]}
            comments = 0
            async with second.stream("POST", COMPLETIONS, json=asked, headers=headers) as response:
                async for line in response.aiter_lines():
                    if line.startswith("id:"):
                        break
                    comments += line.startswith(":")
            assert comments >= 2

    with_two(body, keep_alive_s=0.05)


@pytest.mark.parametrize("other", [False, True])
def test_two_connections_at_a_time_with_one_key(other: bool) -> None:
    """The newer one gets the answer, the older one is told so and not to try again; also at the same gateway."""

    async def body(one: Stack, two: Stack) -> None:
        for node in one.nodes:
            node.held = True
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9}
        key = {"idempotency-key": "k"}
        async with one.http() as first, (two if other else one).http() as second:
            older = asyncio.create_task(first.post(COMPLETIONS, json=asked, headers=key))
            await one.until(lambda: sum(len(node.submits) for node in one.nodes) == 1)
            newer = asyncio.create_task(second.post(COMPLETIONS, json=asked, headers=key))
            refused = await older
            assert refused.status_code == 409
            assert refused.headers["x-should-retry"] == "false"
            for node in one.nodes:
                node.held = False
            assert (await newer).json()["usage"]["completion_tokens"] == 9
            assert len({s.rid for node in one.nodes for s in node.submits}) == 1

    with_two(body)
