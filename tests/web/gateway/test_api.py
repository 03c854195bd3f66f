"""The OpenAI surface over real HTTP: shapes, defaults, refusals; with the official client where it can."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from controlplane.contract.requests import Submit
from controlplane.etcd.health import NO_SPACE
from tests.web.gateway.fake_node import reference, token_at
from tests.web.gateway.stack import KEY, MODEL, Stack, demo_model, stream, with_stack

PROMPT = [400, 401, 402]


def text_of(ids: list[int], prompt: list[int] | None = None) -> str:
    """What the tokens add to the prompt, decoded in one go."""
    tokenizer = demo_model().tokenizer
    before = tokenizer.decode(prompt or [], skip_special_tokens=True)
    whole: str = tokenizer.decode([*(prompt or []), *ids], skip_special_tokens=True)
    return whole[len(before) :]


def test_completion_with_the_openai_client() -> None:
    async def body(stack: Stack) -> None:
        client = stack.openai()
        answer = await client.completions.create(model=MODEL, prompt=PROMPT, seed=7, max_tokens=30)
        choice = answer.choices[0]
        assert answer.object == "text_completion"
        assert answer.id.startswith("cmpl-")
        assert choice.text == text_of(reference(tuple(PROMPT), 7, 30), PROMPT)
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 30)
        assert answer.system_fingerprint is None
        stream = await client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            seed=7,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text
        assert chunks[-1].choices == []
        assert chunks[-1].usage == answer.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])

    with_stack(body)


def test_chat_with_the_openai_client() -> None:
    async def body(stack: Stack) -> None:
        client = stack.openai()
        messages: list[Any] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ]
        common: dict[str, Any] = {"model": MODEL, "messages": messages, "seed": 3, "n": 2}
        answer = await client.chat.completions.create(**common, max_completion_tokens=20)
        assert [c.index for c in answer.choices] == [0, 1]
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content != answer.choices[1].message.content
        submits = [s for node in stack.nodes for s in node.submits]
        assert sorted(s.sampling.seed for s in submits) == [3, 4]
        prompt = submits[0].prompt
        expected = stack.service.model.template
        assert expected is not None
        text = expected.render(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        )
        assert text.endswith("<|assistant|>")
        assert list(prompt) == stack.service.model.tokenizer.encode(text, add_special_tokens=False).ids
        for index, choice in enumerate(answer.choices):
            assert choice.message.content == text_of(reference(prompt, 3 + index, 20))
        chunks = [c async for c in await client.chat.completions.create(**common, max_tokens=20, stream=True)]
        for index in (0, 1):
            deltas = [x.delta for c in chunks for x in c.choices if x.index == index]
            assert deltas[0].role == "assistant"
            assert "".join(d.content or "" for d in deltas) == answer.choices[index].message.content
        assert {c.object for c in chunks} == {"chat.completion.chunk"}
        assert chunks[-1].choices[0].finish_reason == "length"

    with_stack(body)


def test_several_prompts_and_n() -> None:
    async def body(stack: Stack) -> None:
        prompts = [[400, 401], [500, 501, 502]]
        async with stack.http() as client:
            request = {"prompt": prompts, "n": 2, "seed": 5, "max_tokens": 8, "return_token_ids": True}
            events = await stream(client, request | {"stream_options": {"include_usage": True}})
            for index in range(4):
                prompt = tuple(prompts[index // 2])
                assert events.ids(index) == reference(prompt, 5 + index % 2, 8)
            first = [c["choices"][0] for c in events.chunks if c["choices"]]
            assert {tuple(c["prompt_token_ids"]) for c in first if c["prompt_token_ids"]} == {
                tuple(p) for p in prompts
            }
            assert events.chunks[-1]["usage"] == {
                "prompt_tokens": 5,
                "completion_tokens": 32,
                "total_tokens": 37,
            }
            texts = (
                await client.post("/v1/completions", json={"prompt": ["Hello", "World"], "max_tokens": 4})
            ).json()
            assert len(texts["choices"]) == 2

    with_stack(body)


def test_defaults_reach_the_scheduler() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            assert (await client.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200
            request = {
                "prompt": "Hi",
                "temperature": 0,
                "top_k": -1,
                "ignore_eos": True,
                "stop_token_ids": [9],
                "logit_bias": {"12": -5, "3": 1.5},
                "min_tokens": 2,
                "seed": -1,
                "priority": 4,
                "presence_penalty": 1,
            }
            assert (await client.post("/v1/completions", json=request)).status_code == 200
        one, two = sorted(
            (s for node in stack.nodes for s in node.submits), key=lambda s: len(s.sampling.logit_bias)
        )
        assert (one.sampling.max_tokens, one.sampling.temperature, one.sampling.top_p) == (16, 1.0, 1.0)
        assert one.sampling.stop_token_ids == (1, 2)
        assert one.sampling.seed != two.sampling.seed
        assert one.sampling.logprobs is None
        assert two.sampling.stop_token_ids == (9,)
        assert two.sampling.logit_bias == ((3, 1.5), (12, -5.0))
        assert (two.sampling.top_k, two.priority, two.sampling.seed) == (0, 4, 2**63 - 1)

    with_stack(body)


def test_logprobs_of_both_apis() -> None:
    async def body(stack: Stack) -> None:
        client = stack.openai()
        answer = await client.completions.create(model=MODEL, prompt=PROMPT, seed=1, max_tokens=5, logprobs=2)
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.text_offset is not None
        assert found.top_logprobs is not None
        assert found.token_logprobs == [0.0, -0.25, -0.5, -0.75, 0.0]
        assert found.text_offset[1] == len(found.tokens[0])
        assert all(len(top) == 2 for top in found.top_logprobs)
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            seed=1,
            max_tokens=5,
            logprobs=True,
            top_logprobs=3,
        )
        entries = chat.choices[0].logprobs
        assert entries is not None
        assert entries.content is not None
        assert len(entries.content) == 5
        assert all(len(entry.top_logprobs) == 3 for entry in entries.content)
        joined = b"".join(bytes(entry.bytes or []) for entry in entries.content)
        assert joined.decode() == chat.choices[0].message.content

    with_stack(body)


def test_stop_string_ends_the_request_everywhere() -> None:
    async def body(stack: Stack) -> None:
        whole = text_of(reference(tuple(PROMPT), 7, 60), PROMPT)
        at = 40
        stop = whole[at : at + 6]
        cut = whole.index(stop)
        async with stack.http() as client:
            for node in stack.nodes:
                node.step_s = 0.01
            for include in (False, True):
                request = {"prompt": PROMPT, "seed": 7, "max_tokens": 1500, "stop": ["zzzzzz", stop]}
                request |= {"include_stop_str_in_output": include}
                events = await stream(client, request)
                assert events.text() == whole[: cut + (len(stop) if include else 0)]
                assert events.finish() == "stop"
                assert events.chunks[-1]["choices"][0]["stop_reason"] == stop
                answer = (await client.post("/v1/completions", json=request)).json()
                assert answer["choices"][0]["text"] == events.text()
            await stack.until(lambda: not any(node.running for node in stack.nodes))
            assert stack.dispatcher.router.live == 0

    with_stack(body)


def test_stop_tokens() -> None:
    async def body(stack: Stack) -> None:
        ids = reference(tuple(PROMPT), 7, 20)
        stop = ids[10]
        async with stack.http() as client:
            request = {"prompt": PROMPT, "seed": 7, "max_tokens": 50, "return_token_ids": True}
            events = await stream(client, request | {"stop_token_ids": [stop]})
            assert events.ids() == ids[:11]
            assert events.text() == text_of(ids[:10], PROMPT)
            assert (events.finish(), events.chunks[-1]["choices"][0]["stop_reason"]) == ("stop", stop)

    with_stack(body)


def test_a_special_token_may_be_a_stop_string() -> None:
    """Its text is not shown, so that it would never be found there."""

    async def body(stack: Stack) -> None:
        end = stack.service.model.tokenizer.token_to_id("<|user|>")
        for node in stack.nodes:
            node.speak = lambda submit, position: end if position == 3 else 400 + position
        async with stack.http() as client:
            asked = {"prompt": PROMPT, "max_tokens": 6, "stop": ["zzz", "<|user|>"]}
            events = await stream(client, asked)
            assert events.text() == stack.service.model.decode([400, 401, 402])
            assert (events.finish(), events.chunks[-1]["choices"][0]["stop_reason"]) == ("stop", "<|user|>")
            shown = await stream(client, asked | {"skip_special_tokens": False, "stop": ["er|>"]})
            assert shown.text().endswith("<|us")
            assert shown.finish() == "stop"
            assert (await stream(client, asked | {"stop": ["<|us"]})).finish() == "length"

    with_stack(body)


def test_characters_split_over_tokens_stay_whole() -> None:
    text = "naïve 你好 🎉 żółć"
    ids = demo_model().tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text) / 2

    def speak(_: Submit, position: int) -> int:
        return ids[position % len(ids)]

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            request = {"prompt": PROMPT, "max_tokens": len(ids), "return_token_ids": True}
            events = await stream(client, request)
            assert events.text() == text
            cut = await stream(client, request | {"max_tokens": len(ids) - 1})
            assert cut.text() == text[:-1]

    with_stack(body, speak=speak)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_an_event_is_one_line_whatever_a_client_takes_for_lines(logprobs: int | None) -> None:
    text = "a\u2028b\u2029c\x85d\x0b\x1c\r\n😀"

    async def body(stack: Stack) -> None:
        ids = stack.service.model.tokenizer.encode(text, add_special_tokens=False).ids
        for node in stack.nodes:
            node.speak = lambda submit, position: ids[position]
        async with stack.http() as client:  # reads lines as Python does
            asked = {"prompt": PROMPT, "max_tokens": len(ids), "logprobs": logprobs}
            events = await stream(client, asked)
        assert (events.text(), events.done) == (text, True)

    with_stack(body)


def test_echo() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            request = {"prompt": "Once upon", "echo": True, "max_tokens": 3, "seed": 1}
            answer = (await client.post("/v1/completions", json=request)).json()
            assert answer["choices"][0]["text"].startswith("Once upon")
            assert (await stream(client, request)).text() == answer["choices"][0]["text"]

    with_stack(body)


def test_request_id_and_model_routes() -> None:
    async def body(stack: Stack) -> None:
        client = stack.openai()
        assert [m.id async for m in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        answer = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=1, extra_body={"request_id": "abc-1"}
        )
        assert answer.id == "cmpl-abc-1"
        async with stack.http() as http:
            tokens = (
                await http.post("/tokenize", json={"prompt": "Hello world", "return_token_strs": True})
            ).json()
            assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
            assert tokens["max_model_len"] == 2048
            back = await http.post("/detokenize", json={"tokens": tokens["tokens"][-tokens["count"] :]})
            assert "Hello world" in back.json()["prompt"]
            chat = await http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
            assert chat.json()["count"] > 3
            assert (await http.get("/version")).json()["version"]
            assert (await http.get("/load")).json() == {"server_load": 0}
            metrics = (await http.get("/metrics")).text
            assert 'kevlarflow_request_success_total{finished_reason="length"} 1.0' in metrics
            assert "kevlarflow_generation_tokens_total 1.0" in metrics

    with_stack(body)


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "tools": [{"type": "function"}]}, "tools"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
    ({"prompt": "x", "logit_bias": {"abc": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": [1]}, "logit_bias"),
    ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "nonsense": 1}, "nonsense"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "top_p": -0.1}, "top_p"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": ["x"] * 100, "n": 2}, "n"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"include_usages": True}}, "stream_options"),
    ({"prompt": [2048]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [400] * 2048}, "prompt"),
    ({"prompt": "a" * 3_000_000}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
    ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
]
BAD_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "x"}], "logprobs": 1}, "logprobs"),
    ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "prompt"),
    ({"messages": [{"role": "user", "content": "word " * 4000}]}, "prompt"),
]


def test_bad_requests_name_the_parameter() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for path, cases in (("/v1/completions", BAD), ("/v1/chat/completions", BAD_CHAT)):
                for request, param in cases:
                    answer = await client.post(path, json=request)
                    label = json.dumps(request)[:100]
                    assert answer.status_code == 400, (label, answer.text)
                    assert len(answer.content) < 1000, label
                    error = answer.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    assert error["param"] == param, (label, error)
                    assert error["code"] in (400, "context_length_exceeded")
                    assert error["type"] == "BadRequestError"
            assert not any(node.submits for node in stack.nodes)

    with_stack(body)


def test_what_is_too_long_is_told_as_clients_know_it() -> None:
    """Clients shorten the conversation, or ask another model, by OpenAI's code (its own, the ai SDK) or by words of the
    message (litellm; langchain-openai, which knows Anthropic's)."""

    async def body(stack: Stack) -> None:
        # Characters that a message may have: what a template adds is too much.
        most = stack.service.model.chars_max
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("/v1/completions", {"prompt": "word " * 4000}, "prompt"),
            ("/v1/completions", {"prompt": "x" * (most + 1)}, "prompt"),
            ("/v1/completions", {"prompt": "x", "max_tokens": 2048}, "max_tokens"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 4000}]}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * most}]}, "messages"),
            ("/v1/responses", {"input": "x", "max_output_tokens": 2048}, "max_output_tokens"),
            ("/v1/responses", {"input": "x" * most}, "input"),
        ]
        async with stack.http() as client:
            for path, request, param in cases:
                answer = await client.post(path, json=request | {"stream": True})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (400, "context_length_exceeded"), error
                assert error["message"].startswith(
                    "This model's maximum context length is 2048 tokens. However, "
                )
                assert error["param"] == param
                assert ("prompt is too long" in error["message"]) == (not param.startswith("max"))
                assert len(answer.content) < 500

    with_stack(body)


def test_contents_that_are_no_text_are_named() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            asked = {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
            }
            for path in ("/v1/chat/completions", "/tokenize"):
                error = (await client.post(path, json=asked)).json()["error"]
                assert "contents of the type 'image_url' are not supported" in error["message"]
                assert (error["param"], error["code"]) == ("messages", 400)

    with_stack(body)


def test_other_refusals() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            bad = await client.post("/v1/completions", content=b"{nope")
            assert (bad.status_code, "JSON" in bad.json()["error"]["message"]) == (400, True)
            for raw in (b"[]", b'"x"', b"\xff", b"", b"[" * 100_000):
                assert (await client.post("/v1/completions", content=raw)).status_code == 400
            missing = await client.post("/v1/completions", json={"model": "m" * 5000, "prompt": "x"})
            assert missing.status_code == 404
            assert len(missing.content) < 300
            assert (await client.get("/nowhere")).json()["error"]["code"] == 404
            assert (await client.get("/v1/completions")).json()["error"]["code"] == 405
            big = await client.post("/v1/completions", content=b"x" * (5 << 20))
            assert big.status_code == 413

            async def parts() -> Any:
                for _ in range(80):
                    yield b"x" * 65536

            assert (await client.post("/v1/completions", content=parts())).status_code == 413
        for key in ("", "wrong", KEY[:-1]):
            async with stack.http(key) as client:
                for path in ("/v1/models", "/metrics", "/load", "/nowhere", "/openapi.json"):
                    assert (await client.get(path)).status_code == 401, path
                assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 401
                for path in ("/livez", "/readyz", "/health", "/version"):
                    assert (await client.get(path)).status_code == 200, path

    with_stack(body)


def test_what_is_wrong_is_told_to_those_with_a_key() -> None:
    async def body(stack: Stack) -> None:
        stack.service.troubles = lambda: (NO_SPACE,)
        for path in ("/readyz", "/health"):
            for key in ("", "wrong"):
                async with stack.http(key) as client:
                    assert (await client.get(path)).json() == {"status": "degraded"}
            async with stack.http() as client:
                assert NO_SPACE in (await client.get(path)).json()["reasons"]
        stack.place(p0=None, p1=None)
        await stack.until(lambda: stack.service.dispatcher.router.reachable == 0)
        for key, told in (("", False), ("wrong", False), (KEY, True)):
            async with stack.http(key) as client:
                answer = await client.get("/readyz")
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                assert (NO_SPACE in answer.text) is told

    with_stack(body)


def test_what_etcd_refuses_is_told_while_requests_are_served() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            assert NO_SPACE not in (await client.get("/readyz")).json()["reasons"]
            stack.service.troubles = lambda: (NO_SPACE,)
            answer = await client.get("/readyz")
            assert answer.status_code == 200
            assert answer.json()["status"] == "degraded"
            assert NO_SPACE in answer.json()["reasons"]
            assert (
                await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            ).status_code == 200

    with_stack(body)


def test_neutral_values_are_accepted() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            request: dict[str, Any] = {
                "prompt": "x",
                "suffix": None,
                "best_of": 1,
                "user": "u",
                "response_format": {"type": "text"},
                "logit_bias": {},
                "stop": None,
                "stream": False,
                "temperature": 1,
            }
            assert (await client.post("/v1/completions", json=request)).status_code == 200
            chat = {"messages": [{"role": "user", "content": "x"}], "tools": None, "tool_choice": "none"}
            answer = await client.post("/v1/chat/completions", json=chat | {"max_tokens": 2})
            assert answer.status_code == 200

    with_stack(body)


def test_chat_runs_to_the_context_limit_by_default() -> None:
    async def body(stack: Stack) -> None:
        for node in stack.nodes:
            node.burst = 64
        async with stack.http() as client:
            request = {"messages": [{"role": "user", "content": "x"}], "seed": 1}
            usage = (await client.post("/v1/chat/completions", json=request)).json()["usage"]
            assert usage["total_tokens"] == 2048

    with_stack(body)


def test_the_fake_speaks_text_only() -> None:
    """Guards the tests above: a special token in the reference would hide errors."""
    model = demo_model()
    special = {i for i, t in model.tokenizer.get_added_tokens_decoder().items() if t.special}
    assert not special & {token_at((1,), 1, position) for position in range(5000)}
