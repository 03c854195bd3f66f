"""What may be asked of one answer, as bodies of the API: each feature alone, and every two that go together."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.web.gateway.stack import MODEL

Body = dict[str, Any]

TOKENS = 16  # of an answer; a feature may need more
MOST = ("max_tokens", "max_output_tokens")  # of two features the larger
SAID = "The old lady said that she was glad to see him, and he said that he was glad. "
SYSTEM = "You say what was said before."
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["letter", "visit"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"a": {"enum": [1, 22, 333]}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("be", "go")]
FLAT_TOOLS = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in ("be", "go")]
NAMED = {"type": "function", "function": {"name": "go"}}
THOUGHT = "<think>[a-z ]{6,12}</think>(yes|no), [a-z]{3,9}"
FREQUENT = {"257": 1.5, "260": -4.0, "300": 3.0}


@dataclass(frozen=True)
class Feature:
    """What it adds to a body of each API; None: that API has it not. No two of one request share an `answer` kind."""

    name: str
    chat: Body | None = None
    completion: Body | None = None
    responses: Body | None = None
    kinds: frozenset[str] = field(default_factory=frozenset)


def _both(name: str, **body: Any) -> Feature:
    return Feature(name, body, body)


def _answer(name: str, responses: Body | None = None, **body: Any) -> Feature:
    return Feature(name, body, body, responses, frozenset({"answer"}))


def _tools(name: str, choice: Any, flat: Any, *kinds: str) -> Feature:
    chat = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 64}
    responses = {"tools": FLAT_TOOLS, "tool_choice": flat, "max_output_tokens": 64}
    return Feature(name, chat, None, responses, frozenset({"tools", *kinds}))


FEATURES = (
    _answer(
        "json schema",
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "max_output_tokens": 32},
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        max_tokens=32,
    ),
    _answer("regex", structured_outputs={"regex": "(red|green) [a-z]{4,12}( [0-9]{2}){1,3}"}),
    _answer("choice", guided_choice=["a letter to the lady", "a visit to the lady", "nothing"]),
    _answer("grammar", guided_grammar='root ::= ("he" | "she") " said " [a-z]+ ("." | "!")'),
    Feature("reasoning", {"guided_regex": THOUGHT, "max_tokens": 40}, kinds=frozenset({"answer"})),
    _tools("tools auto", "auto", "auto"),
    _tools("tools required", "required", "required", "answer"),
    _tools("tools named", NAMED, {"type": "function", "name": "go"}, "answer"),
    Feature("logprobs", {"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}, {"top_logprobs": 3}),
    _both("prompt logprobs", prompt_logprobs=2, stream=False),
    Feature("echo", None, {"echo": True, "logprobs": 2}),
    _both("bad words", bad_words=["said", " he", "lady", " glad to"]),
    _both("min tokens", min_tokens=10, stop_token_ids=[*range(256, 420)]),
    _both("logit bias", logit_bias=FREQUENT),
    _both("penalties", repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2),
    _both("n", n=2),
    _both("best of", n=2, best_of=3, stream=False),
    _both("stop strings", stop=["lady", "was g"], include_stop_str_in_output=True),
    Feature(
        "nucleus",
        *[{"temperature": 1.3, "top_p": 0.85, "top_k": 40, "min_p": 0.01}] * 2,
        {"temperature": 1.3, "top_p": 0.85, "top_k": 40, "min_p": 0.01},
    ),
    Feature("greedy", {"temperature": 0.0}, {"temperature": 0.0}, {"temperature": 0.0}),
    _both("cut prompt", truncate_prompt_tokens=30),
    Feature("responses", responses={}),
)


@dataclass(frozen=True)
class Asked:
    """A request: `api` is a path below /v1/."""

    name: str
    api: str
    body: Body = field(hash=False)

    @property
    def streams(self) -> bool:
        return bool(self.body["stream"])

    @property
    def seeds(self) -> range:
        """Of its choices."""
        return range(self.body["seed"], self.body["seed"] + self.body.get("best_of", self.body.get("n", 1)))

    @property
    def tokens(self) -> int:
        return int(self.body["max_output_tokens" if self.api == "responses" else "max_tokens"])


def alone() -> list[Asked]:
    """With none of the features, and with each of them."""
    return [asked for features in [(), *((one,) for one in FEATURES)] if (asked := request(*features))]


def pairs() -> list[Asked]:
    """Of every two features that one request may have."""
    return [asked for two in itertools.combinations(FEATURES, 2) if (asked := request(*two))]


def request(*features: Feature) -> Asked | None:
    """A request with all of these features; None: no API has them all, or they say different things."""
    if any(one.kinds & other.kinds for one, other in itertools.combinations(features, 2)):
        return None
    name = " + ".join(feature.name for feature in features) or "none"
    for api, common in _commons(zlib.crc32(name.encode())):
        own = [getattr(feature, "chat" if api == "chat/completions" else api[:10]) for feature in features]
        if None not in own and (body := _joined(common, own)) is not None:
            return Asked(name, api, body)
    return None


def _commons(seed: int) -> Iterator[tuple[str, Body]]:
    text = SAID + SAID[: 20 + seed % 50].rstrip()
    common = {"model": MODEL, "stream": True, "temperature": 0.7, "seed": seed}
    told = common | {"max_tokens": TOKENS, "return_token_ids": True}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    yield "chat/completions", told | {"messages": messages, "enable_thinking": False}
    yield "completions", told | {"prompt": text}
    yield "responses", common | {"instructions": SYSTEM, "input": text, "max_output_tokens": TOKENS}


def _joined(common: Body, parts: list[Mapping[str, Any]]) -> Body | None:
    said: Body = {}
    for key, value in (item for part in parts for item in part.items()):
        if key in MOST:
            said[key] = max(said.get(key, TOKENS), value)
        elif said.setdefault(key, value) != value:
            return None
    body = common | said
    if body["stream"] and "instructions" not in body:
        body["stream_options"] = {"include_usage": True}
    return body
