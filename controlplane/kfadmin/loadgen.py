"""Streams against a gateway, with the time of every token: for `kfadmin demo`, the tests and the benches."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from controlplane.contract.errors import KevlarFlowError
from controlplane.kfadmin.client import trust
from controlplane.unreadable import UNREADABLE

STREAM_LIMIT_S = 180.0
# Silence on a stream; the gateway's keep-alive comments come far more often.
READ_TIMEOUT_S = 30.0
RESUME_LIMIT_S = 30.0  # without a new token, over as many gateways as answer
RESUME_PAUSE_S, RESUME_PAUSE_MAX_S = 0.02, 1.0  # doubled from try to try; the first one is at once


class StreamFailed(KevlarFlowError):
    """A stream was refused or broke the protocol: it ended without [DONE]."""


class Interrupted(StreamFailed):
    """The gateway is gone or going: another one can go on with the stream."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. Same values, same tokens: the seed decides, not the moment or the machine."""

    text: str
    seed: int
    max_tokens: int = 128
    temperature: float = 0.8
    ignore_eos: bool = True
    details: bool = False  # logprobs and usage, too
    schema: str = ""  # JSON schema of the output, as text; it ends where that does, so not with ignore_eos


@dataclass(slots=True)
class Stream:
    """What one stream has brought so far."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # monotonic seconds, one for each token
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    usage: list[dict[str, int]] = field(default_factory=list)
    last_event_id: str = ""
    resumes: int = 0  # connections after the first one
    sent: float = 0.0  # monotonic: when the request was made
    ended: float = 0.0  # monotonic; 0 while it runs
    finish_reason: str = ""
    error: str = ""  # the error event's message

    @property
    def done(self) -> bool:
        return self.ended > 0

    def same_as(self, other: Stream) -> bool:
        """Whether the client got exactly the same answer."""
        return self.answer == other.answer

    @property
    def answer(self) -> tuple[object, ...]:
        """All that a client can tell two streams apart by."""
        return self.tokens, self.text, self.logprobs, self.usage, self.finish_reason, self.error

    def next_token_gap_s(self, moment: float) -> float | None:
        """From `moment` to the next token; None if there was none."""
        return next((at - moment for at in self.times if at > moment), None)

    def longest_pause_s(self, moment: float, window_s: float = 10.0) -> float | None:
        """The longest wait for a token that ended within `window_s` after `moment`, or None.

        Unlike the next token's gap it does not take a token that was already on its way for the recovery.
        """
        longest = self.longest_pause(moment, window_s)
        return None if longest is None else longest[0]

    def longest_pause(self, moment: float, window_s: float = 10.0) -> tuple[float, float] | None:
        """As `longest_pause_s`, and when that wait ended (monotonic seconds)."""
        pauses = [
            (later - max(moment, earlier), later)
            for earlier, later in zip([moment, *self.times], self.times, strict=False)
            if moment < later <= moment + window_s
        ]
        return max(pauses, default=None)


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float] = []


class _Choice(msgspec.Struct):
    text: str = ""
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: dict[str, int] | None = None
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Opens completion streams at one gateway.

    With `others`, gateways of the same cluster, a stream that is interrupted goes on at the next one in turn, as often
    as it takes: what was read before is never read again, and nothing is filtered, so a repeated token would show.
    """

    url: str
    api_key: str
    model: str
    others: tuple[str, ...] = ()
    ca: str = ""  # file with the authorities of their certificates, beside the system's
    read_timeout_s: float = READ_TIMEOUT_S  # a gateway that is silent for so long is as good as gone

    def client(self) -> httpx.AsyncClient:
        """A client with room for many streams; use it as a context manager, in one event loop."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.read_timeout_s, connect=5.0)
        headers = {"authorization": f"Bearer {self.api_key}"}
        return httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, timeout=timeout, trust_env=False,
            verify=trust(self.url, self.ca),
        )  # fmt: skip

    async def stream(
        self,
        client: httpx.AsyncClient,
        prompt: Prompt,
        into: Stream | None = None,
        on_tokens: Callable[[Stream], None] | None = None,
    ) -> Stream:
        """Read one completion to its end. An error event ends up in `Stream.error`.

        Raises StreamFailed when the request is refused, or ends without [DONE], or takes too long.
        """
        stream = into or Stream(prompt)
        body = {
            "model": self.model,
            "prompt": prompt.text,
            "seed": prompt.seed,
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "ignore_eos": prompt.ignore_eos,
            "stream": True,
            "return_token_ids": True,
        }
        if prompt.details:
            body |= {"logprobs": 0, "stream_options": {"include_usage": True}}
        if prompt.schema:
            body |= {"structured_outputs": {"json": prompt.schema}}
        stream.sent = time.monotonic()
        try:
            async with asyncio.timeout(STREAM_LIMIT_S):
                await self._read(client, body, stream, on_tokens)
        except (httpx.HTTPError, TimeoutError, *UNREADABLE) as error:
            raise StreamFailed(
                f"after {len(stream.tokens)} tokens: {type(error).__name__}: {error}"
            ) from error
        finally:
            stream.ended = time.monotonic()
        return stream

    async def _read(
        self,
        client: httpx.AsyncClient,
        body: dict[str, object],
        stream: Stream,
        on_tokens: Callable[[Stream], None] | None,
    ) -> None:
        """To its end, over as many gateways as it takes."""
        # The first answer may be lost before any event id: the key keeps a second try from computing twice.
        headers = {"idempotency-key": secrets.token_hex(8)} if self.others else {}
        progress_at, pause_s = time.monotonic(), 0.0
        for url in itertools.cycle((self.url, *self.others)):
            had = len(stream.tokens)
            if stream.last_event_id:
                headers = {"last-event-id": stream.last_event_id}
            try:
                async with client.stream(
                    "POST", f"{url}/v1/completions", json=body, headers=headers
                ) as response:
                    return await _read_events(response, stream, on_tokens)
            except (httpx.TransportError, Interrupted):
                now = time.monotonic()
                if len(stream.tokens) > had:
                    progress_at, pause_s = now, 0.0
                if not self.others or now - progress_at > RESUME_LIMIT_S:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, RESUME_PAUSE_S), RESUME_PAUSE_MAX_S)
            stream.resumes += 1
        return None

    async def streams(
        self,
        prompts: Sequence[Prompt],
        into: Sequence[Stream] | None = None,
        on_tokens: Callable[[Stream], None] | None = None,
    ) -> list[Stream]:
        """All of them at once. When one fails with StreamFailed the others are given up."""
        targets = into or [Stream(prompt) for prompt in prompts]
        async with self.client() as client:
            tasks = [
                asyncio.create_task(self.stream(client, prompt, target, on_tokens))
                for prompt, target in zip(prompts, targets, strict=True)
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def _read_events(
    response: httpx.Response, stream: Stream, on_tokens: Callable[[Stream], None] | None
) -> None:
    if response.status_code != 200:
        text = (await response.aread())[:300].decode(errors="replace")
        kind = Interrupted if response.status_code == 503 else StreamFailed
        raise kind(f"HTTP {response.status_code}: {text}")
    async for event in _events(response):
        if event["data"] == "[DONE]":
            return
        if event.get("event") == "reconnect":
            raise Interrupted(f"the gateway is shutting down: {event['data'][:300]}")
        now = time.monotonic()
        chunk = _decode_chunk(event["data"])
        stream.last_event_id = event.get("id", stream.last_event_id)
        if chunk.error is not None:
            stream.error = chunk.error.message or "error"
        if chunk.usage is not None:
            stream.usage.append(chunk.usage)
        for choice in chunk.choices:
            fresh = choice.token_ids or []
            stream.tokens += fresh
            stream.times += [now] * len(fresh)
            stream.text += choice.text
            stream.logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
            stream.finish_reason = choice.finish_reason or stream.finish_reason
            if on_tokens is not None and fresh:
                on_tokens(stream)
    raise Interrupted(f"the stream ended without [DONE] after {len(stream.tokens)} tokens")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Whole events with data: an event counts once its empty line is there, as the standard has it."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif fields:
            if "data" in fields:
                yield fields
            fields = {}


OPENINGS = (
    "It was a bright morning, and",
    "She had no sooner entered the room than",
    "The letter, which arrived on Tuesday,",
    "Nothing could be more agreeable than",
    "When the carriage stopped at the door,",
    "He was certainly a man of",
    "My dear sister, you must know that",
    "The whole party were assembled in",
)


def sample_prompts(
    count: int, max_tokens: int, *, first_seed: int = 1, words: int = 0, temperature: float = 0.8
) -> list[Prompt]:
    """`count` different requests; with `words` their prompts are that many words long."""
    prompts = []
    for number in range(count):
        start = number % len(OPENINGS)
        text = OPENINGS[start]
        if words:
            endless = itertools.cycle(" ".join(OPENINGS[start:] + OPENINGS[:start]).split())
            text = " ".join(itertools.islice(endless, words))
        prompts.append(Prompt(text, first_seed + number, max_tokens, temperature))
    return prompts
