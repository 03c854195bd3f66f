"""Several models behind one gateway: `model` chooses, and what becomes of one is none of the other's business."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import openai
import pytest

from controlplane.contract.api_keys import KeyLimits, make_key
from controlplane.contract.errors import ConfigError
from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from tests.web.gateway.fake_node import FakeNode, reference
from tests.web.gateway.stack import KEY, MODEL, Stack, demo_model, with_stack
from web.gateway.http.api_keys import ApiKeys
from web.gateway.resume.tickets import rid_of
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.routing.events import TopologySeen
from web.gateway.routing.policy import Policy
from web.gateway.services import Services

OTHER = "other-model"
PROMPT = [400, 401, 402]


@contextlib.asynccontextmanager
async def another(stack: Stack) -> AsyncIterator[FakeNode]:
    """A second group: its own node, its own topology, the same names of nodes and pipelines."""
    node = await FakeNode(Member("n0", "other"), twist=True).start()
    dispatcher = Dispatcher(Policy(grace_s=0.3), "t", stack.service.metrics)
    try:
        dispatcher.locate(node.member, node.address)
        service = replace(stack.service, model=replace(demo_model(), name=OTHER), dispatcher=dispatcher)
        stack.services.add(service)
        stack.service.metrics.add(dispatcher.router)
        node.epochs["p0"] = 1
        pipeline = Pipeline("p0", 1, (Stage(("n0",), (node.member,)),))
        dispatcher.feed(TopologySeen(Topology("other", 1, Mode.REPLICATE, (pipeline,))))
        await stack.until(lambda: dispatcher.router.reachable == 1)
        yield node
    finally:
        await node.stop()
        await dispatcher.aclose()


def test_model_chooses_the_group() -> None:
    async def body(stack: Stack) -> None:
        async with another(stack), stack.http() as http:
            client = stack.openai()
            listed = (await client.models.list()).data
            assert [model.id for model in listed] == [MODEL, OTHER]
            assert (await client.models.retrieve(OTHER)).id == OTHER
            texts = {}
            for name in (MODEL, OTHER):
                answer = await client.completions.create(model=name, prompt=PROMPT, max_tokens=6, seed=3)
                assert answer.model == name
                texts[name] = answer.choices[0].text
            model = stack.service.model
            assert texts[MODEL] == model.decode(reference(tuple(PROMPT), 3, 6))
            assert texts[OTHER] != texts[MODEL]  # another node has answered
            unnamed = (
                await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 6, "seed": 3})
            ).json()
            assert (unnamed["model"], unnamed["choices"][0]["text"]) == (MODEL, texts[MODEL])
            for ask in (
                client.completions.create(model="nobody", prompt="x"),
                client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}]),
                client.models.retrieve("nobody"),
            ):
                with pytest.raises(openai.NotFoundError, match="the model 'nobody' does not exist"):
                    await ask
            for path, asked in (("/tokenize", {"prompt": "a b"}), ("/detokenize", {"tokens": PROMPT})):
                assert (await http.post(path, json=asked | {"model": OTHER})).status_code == 200
                assert (await http.post(path, json=asked | {"model": "nobody"})).status_code == 404
            # What is no JSON at all is said as ever.
            assert (await http.post("/v1/completions", content=b'{"model": "oth')).status_code == 400
            ready = (await http.get("/readyz")).json()
            assert ready["models"] == {MODEL: 2, OTHER: 1}
            assert ready["pipelines"] == 3
            assert "kevlarflow_pipelines_reachable 3.0" in (await http.get("/metrics")).text

    with_stack(body)


# Of every route: what a key that is for OTHER alone is answered where MODEL is meant.
FOR_ANOTHER: dict[tuple[str, str], tuple[dict[str, Any] | None, int]] = {
    ("GET", "/livez"): (None, 200),
    ("GET", "/readyz"): (None, 200),
    ("GET", "/health"): (None, 200),
    ("GET", "/version"): (None, 200),
    ("GET", "/load"): (None, 200),
    ("GET", "/metrics"): (None, 403),
    ("GET", "/openapi.json"): (None, 200),
    ("GET", "/v1/models"): (None, 200),
    ("GET", "/v1/models/{name}"): (None, 403),
    ("GET", "/tokenizer_info"): (None, 403),
    ("GET", "/v1/streams/{stream}"): (None, 404),  # no stream of this key is of MODEL
    ("POST", "/v1/completions"): ({"prompt": "x", "max_tokens": 1}, 403),
    ("POST", "/v1/chat/completions"): ({"messages": [{"role": "user", "content": "x"}]}, 403),
    ("POST", "/v1/responses"): ({"input": "x"}, 403),
    ("POST", "/tokenize"): ({"prompt": "x"}, 403),
    ("POST", "/detokenize"): ({"tokens": PROMPT}, 403),
}


def test_a_key_for_one_model_learns_nothing_of_another_on_any_route() -> None:
    text, record = make_key("narrow", "", int(time.time()), 0, KeyLimits((OTHER,)))

    async def body(stack: Stack) -> None:
        async with another(stack), stack.http(text) as http:
            paths = (await http.get("/openapi.json")).json()["paths"]
            routes = {(verb.upper(), path) for path, verbs in paths.items() for verb in verbs}
            wanted = {(verb, path) for verb, path in routes if verb in {"GET", "POST"}} | {
                ("GET", "/openapi.json")
            }
            assert wanted == FOR_ANOTHER.keys(), "a route without a line in the table"
            for (verb, path), (asked, status) in FOR_ANOTHER.items():
                concrete = path.format(name=MODEL, stream="nonsense")
                for named in ({}, {"model": MODEL}) if asked is not None else ({},):
                    json = asked | named if asked is not None else None
                    answer = await http.request(verb, concrete, json=json)
                    assert answer.status_code == status, (verb, path, answer.text)
            listed = (await http.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == [OTHER]
            assert (await http.get(f"/v1/models/{OTHER}")).json()["id"] == OTHER
            asked = {"model": OTHER, "prompt": PROMPT, "max_tokens": 2}
            assert (await http.post("/v1/completions", json=asked)).status_code == 200

    with_stack(body, keys=ApiKeys([KEY], [record]))


def test_what_is_wrong_with_a_model_is_told_to_no_key_for_another() -> None:
    """Nor is it named to a key for none of those that are served."""
    keys = [
        make_key(name, "", int(time.time()), 0, KeyLimits(models))
        for name, models in (("one", (OTHER,)), ("none", ("elsewhere",)), ("both", (MODEL, OTHER)))
    ]

    async def body(stack: Stack) -> None:
        async with another(stack):
            for (text, record), whole in zip(keys, (False, False, True), strict=True):
                async with stack.http(text) as http:
                    for path in ("/readyz", "/health"):
                        told = await http.get(path)
                        assert told.status_code == 200
                        assert (MODEL in told.text, "reasons" in told.json()) == (whole, whole), record.name
                    if record.name == "none":
                        refused = await http.post("/v1/completions", json={"prompt": "x"})
                        assert refused.status_code == 403
                        assert MODEL not in refused.text

    with_stack(body, keys=ApiKeys([KEY], [record for _, record in keys]))


def test_a_group_that_is_away_hurts_no_other() -> None:
    async def body(stack: Stack) -> None:
        async with another(stack) as node, stack.http() as http:
            client = stack.openai()
            await node.stop()
            other = stack.services.named(OTHER).dispatcher.router
            await stack.until(lambda: other.reachable == 0)
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(model=OTHER, prompt=PROMPT, max_tokens=3)
            assert refused.value.status_code == 503
            await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3)
            ready = await http.get("/readyz")
            assert ready.status_code == 200
            assert ready.json()["models"] == {MODEL: 2, OTHER: 0}
            assert ready.json()["status"] == "degraded"
            assert ready.json()["reasons"][-1] == f"{OTHER}: p0: its scheduler on n0@other cannot be reached"
            stack.place(p0=None, p1=None)  # now the other way round: nobody is there
            assert (await http.get("/readyz")).status_code == 503

    with_stack(body)


def test_a_stream_is_found_in_its_group_without_a_body() -> None:
    async def body(stack: Stack) -> None:
        async with another(stack) as node, stack.http() as http:
            asked = {"model": OTHER, "prompt": PROMPT, "max_tokens": 8, "seed": 3, "stream": True}
            whole = (await http.post("/v1/completions", json=asked)).text
            node.step_s = 0.05
            async with http.stream("POST", "/v1/completions", json=asked) as answer:
                where = answer.headers["content-location"]
                lines = answer.aiter_lines()
                while not (await anext(lines)).startswith("data:"):
                    pass
                rest = (await http.get(where)).text
            assert tokens_of(rest) == tokens_of(whole)

    with_stack(body)


def test_a_stream_is_found_by_what_is_left_of_it() -> None:
    """Its first choice ended long ago: the group is the one that has another."""

    async def body(stack: Stack) -> None:
        async with another(stack) as node, stack.http() as http:
            asked = {"model": OTHER, "prompt": PROMPT, "max_tokens": 8, "n": 2, "seed": 3, "stream": True}
            answer = await http.post("/v1/completions", json=asked)
            stream = answer.headers["content-location"].rpartition("/")[2]
            nonce = stack.service.tickets.read(stream, stack.keys_owner).nonce
            del node.known[rid_of(nonce, 0)]
            for cursor in ("8f-3", "2-3"):  # the client has all of it, or has not
                headers = {"last-event-id": f"{stream}.{cursor}"}
                rest = await http.get(f"/v1/streams/{stream}", headers=headers)
                assert rest.status_code == 200, rest.text
                assert f'"model":"{OTHER}"' in rest.text

    with_stack(body)


def tokens_of(events: str) -> str:
    found = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")]
    return "".join(msgspec.json.decode(line)["choices"][0]["text"] for line in found)


def test_a_key_for_one_model_goes_no_further() -> None:
    secret, record = make_key("alice", "team", int(time.time()), 0, KeyLimits(models=(OTHER,)))

    async def body(stack: Stack) -> None:
        async with another(stack), stack.http(secret) as http:
            for model, status in ((OTHER, 200), (MODEL, 403), (None, 403)):
                asked = {"prompt": PROMPT, "max_tokens": 3} | ({"model": model} if model else {})
                assert (await http.post("/v1/completions", json=asked)).status_code == status
            for model, status in ((OTHER, 200), (MODEL, 403)):
                answer = await http.post("/tokenize", json={"prompt": "a", "model": model})
                assert answer.status_code == status

    with_stack(body, keys=ApiKeys([], (record,)))


def test_two_groups_cannot_have_one_name() -> None:
    async def body(stack: Stack) -> None:
        services = Services(stack.service)
        with pytest.raises(ConfigError, match="give one another served_model_name"):
            services.add(replace(stack.service, dispatcher=stack.dispatcher))

    with_stack(body)
