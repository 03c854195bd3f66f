"""What is asked of prompts: their log probabilities, a shorter one, one that goes on with the last message, another
template; and of outputs: none at all, the best of several, words that may not be in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.web.gateway.scripted import QWEN, scripted_model
from tests.web.gateway.stack import Stack, beside, demo_model, stream, with_stack
from web.gateway.text.detok import text_of

PROMPT = [0, 400, 500, 600]
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the \n"}]


async def post(stack: Stack, path: str = "/v1/completions", status: int = 200, **body: Any) -> dict[str, Any]:
    async with stack.http() as client:
        answer = await client.post(path, json={"seed": 3, "max_tokens": 4, **body})
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found


async def prompt_of(stack: Stack, **body: Any) -> str:
    """What a chat becomes for the model."""
    before = [len(node.submits) for node in stack.nodes]
    await post(stack, "/v1/chat/completions", **body)
    new = [s for node, count in zip(stack.nodes, before, strict=True) for s in node.submits[count:]]
    return stack.service.model.decode(list(new[0].prompt))


@pytest.mark.parametrize("top", [0, 1, 5])
def test_an_echo_with_log_probabilities(top: int) -> None:
    async def body(stack: Stack) -> None:
        plain = (await post(stack, prompt=PROMPT, logprobs=top))["choices"][0]
        whole = await post(stack, prompt=PROMPT, logprobs=top, echo=True)
        choice = whole["choices"][0]
        echo = text_of(stack.service.model.tokenizer, PROMPT, True)[0]
        assert choice["text"] == echo + plain["text"]
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(PROMPT) + 4
        assert found["token_logprobs"][:4] == [None, -0.25, -0.5, -0.75]
        assert found["token_logprobs"][4:] == plain["logprobs"]["token_logprobs"]
        assert found["top_logprobs"][0] is None
        for name, value, best in zip(
            found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
        ):
            assert best[name] == value
            assert len(best) >= max(1, top)
        for name, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[1:]:
            assert choice["text"][offset:].startswith(name)
        assert whole["usage"]["completion_tokens"] == 4
        events: Any = None
        async with stack.http() as client:
            events = await stream(
                client, {"prompt": PROMPT, "logprobs": top, "echo": True, "seed": 3, "max_tokens": 4}
            )
        assert events.text() == choice["text"]
        parts = [c["choices"][0]["logprobs"] for c in events.chunks]
        assert {key: [item for part in parts for item in part[key]] for key in found} == found

    with_stack(body)


def test_a_stream_with_an_echo_goes_on_elsewhere_without_it() -> None:
    async def body(stack: Stack) -> None:
        request = {"prompt": PROMPT, "logprobs": 2, "echo": True, "seed": 3, "max_tokens": 6}
        async with beside(stack) as other, stack.http() as client, other.http() as client2:
            whole = await stream(client, request)
            ticket = whole.last_id.partition(".")[0]
            names = [n for c in whole.chunks for n in c["choices"][0]["logprobs"]["tokens"]]
            assert len(names) == len(PROMPT) + 6
            for had in range(6):
                lines: list[str] = []
                headers = {"last-event-id": f"{ticket}.{had or '-'}"} if had else {}
                async with client2.stream(
                    "POST",
                    "/v1/completions",
                    json={"model": "kevlar-demo", "stream": True, **request},
                    headers=headers,
                ) as response:
                    assert response.status_code == 200
                    lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
                choices = [c for line in lines for c in json.loads(line[6:])["choices"]]
                again = [name for choice in choices for name in choice["logprobs"]["tokens"]]
                assert again == (names[len(PROMPT) + had :] if had else names)

    with_stack(body)


def test_prompt_logprobs_have_vllms_shapes() -> None:
    async def body(stack: Stack) -> None:
        name = stack.service.model.vocabulary.text
        for path, request in (
            ("/v1/completions", {"prompt": PROMPT}),
            ("/v1/chat/completions", {"messages": CHAT[:1]}),
        ):
            answer = await post(stack, path, prompt_logprobs=2, **request)
            found = (
                answer["choices"][0]["prompt_logprobs"] if "prompt" in request else answer["prompt_logprobs"]
            )
            submit = next(s for node in stack.nodes for s in node.submits if s.sampling.prompt_logprobs == 2)
            for node in stack.nodes:
                node.submits.clear()
            assert found[0] is None
            assert len(found) == len(submit.prompt)
            for at, (token, entries) in enumerate(zip(submit.prompt[1:], found[1:], strict=True), 1):
                own = {"logprob": -0.25 * at, "rank": 2, "decoded_token": name(token)}
                best = {"logprob": -0.125 * at, "rank": 1, "decoded_token": name(token + 1)}
                assert entries == {str(token): own, str(token + 1): best}
                assert list(entries) == [str(token), str(token + 1)]
            only = await post(stack, path, prompt_logprobs=0, **request)
            found = only["choices"][0]["prompt_logprobs"] if "prompt" in request else only["prompt_logprobs"]
            assert all(len(entries) == 1 for entries in found[1:])
            refused = await post(stack, path, 400, prompt_logprobs=1, stream=True, **request)
            assert refused["error"]["param"] == "prompt_logprobs"
        both = await post(stack, prompt=PROMPT, prompt_logprobs=3, logprobs=1, echo=True)
        choice = both["choices"][0]
        assert [len(e) for e in choice["prompt_logprobs"][1:]] == [3, 3, 3]
        assert [len(e) for e in choice["logprobs"]["top_logprobs"][1:4]] == [2, 2, 2]

    with_stack(body)


def test_what_is_too_much_names_the_limit() -> None:
    async def body(stack: Stack) -> None:
        long = [400] * 1000
        refused = await post(stack, status=400, prompt=long, echo=True, logprobs=20, stream=True)
        assert refused["error"]["param"] == "logprobs"
        assert "16384" in refused["error"]["message"]
        assert (await post(stack, prompt=long, echo=True, logprobs=20, max_tokens=1))["usage"][
            "prompt_tokens"
        ] == 1000
        context = stack.service.model.context
        context.registered("n0", 2048, "1.9.1", 0)
        try:
            for more in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}, {"bad_words": ["x"]}):
                refused = await post(stack, status=503, prompt=PROMPT, **more)
                assert "node n0 runs code" in refused["error"]["message"]
        finally:
            context.keep(())

    with_stack(body)


def test_nothing_but_the_prompt() -> None:
    async def body(stack: Stack) -> None:
        answer = await post(stack, prompt=[PROMPT, PROMPT[:3]], echo=True, logprobs=1, max_tokens=0)
        for choice, prompt in zip(answer["choices"], (PROMPT, PROMPT[:3]), strict=True):
            assert choice["text"] == text_of(stack.service.model.tokenizer, prompt, True)[0]
            assert choice["finish_reason"] == "length"
            assert [len(part) for part in choice["logprobs"].values()] == [len(prompt)] * 4
        assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
        alone = await post(stack, prompt=PROMPT, prompt_logprobs=0, max_tokens=0, return_token_ids=True)
        assert (alone["choices"][0]["text"], alone["choices"][0]["token_ids"]) == ("", [])
        assert len(alone["choices"][0]["prompt_logprobs"]) == len(PROMPT)
        async with stack.http() as client:
            events = await stream(client, {"prompt": PROMPT, "echo": True, "max_tokens": 0})
        assert (events.text(), events.finish()) == (answer["choices"][0]["text"], "length")
        refused = await post(stack, status=400, prompt=PROMPT, max_tokens=0)
        assert refused["error"]["param"] == "max_tokens"
        refused = await post(stack, "/v1/chat/completions", 400, messages=CHAT[:1], max_tokens=0)
        assert refused["error"]["param"] == "max_tokens"

    with_stack(body)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_best_of_several_by_the_mean_of_their_tokens(path: str) -> None:
    """The imaginary model's tokens get less likely within four, so that a choice that ends early is a better one."""

    async def body(stack: Stack) -> None:
        eos = stack.service.model.eos_token_ids[0]
        ends = {3: 9, 4: 2, 5: 9, 6: 1, 7: 3}
        for node in stack.nodes:
            node.speak = lambda submit, at: (
                eos if at + 1 == ends[submit.sampling.seed] else 300 + submit.sampling.seed
            )
        request: dict[str, Any] = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": CHAT[:1]}
        answer = await post(stack, path, n=2, best_of=5, max_tokens=20, return_token_ids=True, **request)
        assert [c["index"] for c in answer["choices"]] == [0, 1]
        assert [c["token_ids"] for c in answer["choices"]] == [[eos], [304, eos]]
        assert all(c["logprobs"] is None for c in answer["choices"])
        assert answer["usage"]["completion_tokens"] == sum(ends.values())
        for more in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}):
            refused = await post(stack, path, 400, **request, **more)
            assert refused["error"]["param"] == "best_of"

    with_stack(body)


def test_bad_words_are_tokens_within_a_text_and_after_a_space() -> None:
    async def body(stack: Stack) -> None:
        encode = stack.service.model.tokenizer.encode
        await post(stack, prompt=PROMPT, bad_words=["house", " old house"])
        (submit,) = [s for node in stack.nodes for s in node.submits]
        wanted = {tuple(encode(t, add_special_tokens=False).ids) for t in ("house", " house", " old house")}
        assert set(submit.sampling.bad_words) == wanted
        for words in (["x" * 1000], [""], "x", ["x"] * 129):
            refused = await post(stack, status=400, prompt=PROMPT, bad_words=words)
            assert refused["error"]["param"] == "bad_words"

    with_stack(body)


def test_prompts_are_cut() -> None:
    async def body(stack: Stack) -> None:
        async def sent(**more: Any) -> list[int]:
            await post(stack, **{"prompt": PROMPT, **more})
            return list([s for node in stack.nodes for s in node.submits][-1].prompt)

        stack.place(p1=None)
        assert await sent(truncate_prompt_tokens=2) == PROMPT[-2:]
        assert await sent(truncate_prompt_tokens=2, truncation_side="right") == PROMPT[:2]
        assert await sent(truncate_prompt_tokens=9) == PROMPT
        limit = stack.service.model.max_model_len
        assert await sent(prompt=[400] * (limit + 50), truncate_prompt_tokens=-1) == [400] * (limit - 4)
        assert len(await sent(prompt="house " * (2 * limit), truncate_prompt_tokens=5)) == 5
        echoed = await post(stack, prompt=PROMPT, truncate_prompt_tokens=2, echo=True, max_tokens=0)
        assert echoed["choices"][0]["text"] == text_of(stack.service.model.tokenizer, PROMPT[-2:], True)[0]
        refused = await post(stack, status=400, prompt=PROMPT, truncate_prompt_tokens=0)
        assert refused["error"]["param"] == "truncate_prompt_tokens"

    with_stack(body)


def test_an_answer_goes_on_with_the_last_message(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        path = "/v1/chat/completions"
        assert (
            await prompt_of(stack, messages=CHAT)
            == "<|user|>Where?<|end|><|assistant|>In the \n<|end|><|assistant|>"
        )
        cut = "<|user|>Where?<|end|><|assistant|>In the \n"
        assert await prompt_of(stack, messages=CHAT, continue_final_message=True) == cut
        parts = [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "In the \n"}]}]
        assert await prompt_of(stack, messages=parts, continue_final_message=True) == cut
        for last in ({"role": "assistant", "content": ""}, {"role": "tool", "content": None}):
            messages = [CHAT[0], last]
            refused = await post(stack, path, 400, messages=messages, continue_final_message=True)
            assert "no text to go on with" in refused["error"]["message"]
        refused = await post(
            stack, path, 400, messages=CHAT, continue_final_message=True, add_generation_prompt=True
        )
        assert refused["error"]["param"] == "continue_final_message"
        async with stack.http() as client:
            answer = await client.post("/tokenize", json={"messages": CHAT, "continue_final_message": True})
        assert stack.service.model.decode(answer.json()["tokens"]) == cut

    with_stack(body, model=scripted_model(tmp_path, QWEN))


def test_a_template_of_the_requests_own_is_a_setting() -> None:
    async def body(stack: Stack) -> None:
        path = "/v1/chat/completions"
        own = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if x is defined %}{{ x }}{% endif %}"
        refused = await post(stack, path, 400, messages=CHAT, chat_template=own)
        assert (refused["error"]["param"], "request_chat_template" in refused["error"]["message"]) == (
            "chat_template",
            True,
        )
        stack.service.request_chat_template = True
        assert await prompt_of(stack, messages=CHAT, chat_template=own) == "[user]Where?[assistant]In the \n"
        given = await prompt_of(stack, messages=CHAT[:1], chat_template=own, chat_template_kwargs={"x": "!"})
        assert given == "[user]Where?!"
        loop = "{% for i in range(10**9) %}{% endfor %}"
        for wrong in ("{% for %}", "{{ ''.__class__.__mro__ }}", loop, "{{ 1 // 0 }}"):
            refused = await post(stack, path, 400, messages=CHAT, chat_template=wrong)
            assert "template" in refused["error"]["message"]
        refused = await post(stack, path, 400, messages=CHAT, chat_template="x" * 70_000)
        assert refused["error"]["param"] == "chat_template"

    with_stack(body, model=dataclasses.replace(demo_model()))
