"""The load of `bench kevlarflow`: requests with given arrival times, and a client that costs next to nothing.

The client reads bytes and their times and understands them when a stream has ended: two processors carry up to sixteen
nodes, and what the client takes of them makes everything slower that is measured.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
import numpy as np

# Log-normal lengths, in tokens. Outputs: in the published Table 1 a request at 1 per second takes 64 s on average and
# 143 s at p99; at 163 ms a token that is 390 and 880 tokens, and a log-normal with these two has sigma 0.38. Prompts:
# ShareGPT's, as commonly filtered for serving benches, have about 160 tokens; with sigma 0.8 their p99 is 750.
OUTPUT_MEAN, OUTPUT_SIGMA, OUTPUT_MAX = 390.0, 0.38, 1200
PROMPT_MEAN, PROMPT_SIGMA, PROMPT_MAX = 160.0, 0.8, 800
VOCABULARY = range(16, 2048)  # token ids of prompts; the first are special
STREAM_LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float  # arrival, in emulated seconds
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int


def workload(rate: float, seconds: float, seed: int = 1, limit: int = 1 << 30) -> list[Request]:
    """Poisson arrivals over `seconds` (emulated), at most `limit`. The same arguments give the same requests."""
    random = np.random.default_rng(seed)
    requests: list[Request] = []
    at_s = 0.0
    while True:
        at_s += float(random.exponential(1.0 / rate))
        if at_s >= seconds or len(requests) == limit:
            return requests
        prompt = _length(random, PROMPT_MEAN, PROMPT_SIGMA, PROMPT_MAX)
        output = _length(random, OUTPUT_MEAN, OUTPUT_SIGMA, OUTPUT_MAX)
        ids = random.integers(VOCABULARY.start, VOCABULARY.stop, prompt)
        requests.append(Request(at_s, tuple(ids.tolist()), output, len(requests) + 1))


def _length(random: np.random.Generator, mean: float, sigma: float, most: int) -> int:
    return min(most, max(1, round(float(random.lognormal(np.log(mean) - sigma * sigma / 2, sigma)))))


@dataclass(slots=True)
class Outcome:
    """What a client saw of one request. Times are monotonic, real seconds."""

    request: Request
    due: float = 0.0  # when it should have been sent: what a late client costs is counted, too
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # one for each token
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.due

    @property
    def latency_s(self) -> float:
        return self.times[-1] - self.due


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Reader(asyncio.Protocol):
    """One connection, one request."""

    def __init__(self, client: Client, message: bytes) -> None:
        self._client = client
        self._message = message
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        self._client.pieces += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Client:
    """Sends requests to one gateway, each on a connection of its own."""

    def __init__(self, url: str, api_key: str, model: str, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: of an https address, with the authorities that count."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.host, self.port, self.tls = parts.hostname, parts.port, tls
        self._model = model
        self.pieces = 0  # that have come, over all requests
        self._head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {api_key}\r\n"
            "Content-Type: application/json\r\n"
        )

    def message(self, request: Request, more: str = "") -> bytes:
        """A request as it is sent. `more`: lines of its head."""
        body = json.dumps({
            "model": self._model, "prompt": list(request.prompt), "max_tokens": request.max_tokens,
            "seed": request.seed, "temperature": 1.0, "ignore_eos": True, "stream": True,
            "return_token_ids": True, "add_special_tokens": False,
        }).encode()  # fmt: skip
        return f"{self._head}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def run(self, request: Request, due: float) -> Outcome:
        """One request to its end; what goes wrong is in `Outcome.error`."""
        outcome = Outcome(request, due)
        message = self.message(request, "Connection: close\r\n")
        loop = asyncio.get_running_loop()
        reader: _Reader | None = None
        try:
            transport, reader = await loop.create_connection(
                lambda: _Reader(self, message), self.host, self.port, ssl=self.tls
            )
            try:
                async with asyncio.timeout(STREAM_LIMIT_S):
                    await reader.ended
            finally:
                transport.abort()
        except OSError as error:  # TimeoutError, too
            outcome.error = f"{type(error).__name__}: {error}"
        if reader is not None:
            read(reader.pieces, outcome)
        return outcome


def read(pieces: Sequence[tuple[float, bytes]], outcome: Outcome) -> None:
    """Server-sent events out of an HTTP/1.1 answer. Each token has the time of the piece that completed its event.

    A chunk's length is a line of its own, and no line of an event looks like one; so lines are enough.
    """
    rest = b""
    status = b""
    done = False
    for at, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not status:
                status = line.split(b" ", 2)[1]
            elif line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                event = _decode_event(line[6:])
                if event.error is not None:
                    outcome.error = event.error.message or "error"
                for choice in event.choices:
                    fresh = choice.token_ids or []
                    outcome.tokens += fresh
                    outcome.times += [at] * len(fresh)
    if status != b"200":
        outcome.error = outcome.error or f"HTTP {status.decode() or 'nothing'}: {rest[:200]!r}"
    elif not done and not outcome.error:
        outcome.error = f"ended without [DONE] after {len(outcome.tokens)} tokens"


async def drive(
    client: Client,
    requests: Sequence[Request],
    time_scale: float,
    started: float,
    on_end: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Send each request when it is due, `started` being emulated second 0; returns when all have ended."""

    async def one(request: Request) -> Outcome:
        due = started + request.at_s / time_scale
        await asyncio.sleep(due - time.monotonic())
        outcome = await client.run(request, due)
        on_end(outcome)
        return outcome

    return await asyncio.gather(*(one(request) for request in requests))
