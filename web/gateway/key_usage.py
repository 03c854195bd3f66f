"""What each API key has used and may still use (pure): requests and tokens a minute, requests at a time.

A minute's allowance is a bucket that fills evenly. Tokens are charged when they are there, so a bucket may be
overdrawn; who has overdrawn it waits until it is above zero again. What is under way goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.contract.api_keys import KeyLimits
from web.gateway.errors import ApiError

MINUTE_S = 60.0
STREAMS_RETRY_S = 1.0


@dataclass(slots=True)
class Bucket:
    """`per_minute` at most, and so many in a minute; 0: without bound."""

    per_minute: int
    left: float = 0.0
    at: float = 0.0

    def __post_init__(self) -> None:
        self.left = float(self.per_minute)

    def fill(self, now: float) -> None:
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / MINUTE_S)
        self.at = now

    def wait_s(self, needed: float) -> float:
        """Until so much is there."""
        return max(0.0, (needed - self.left) * MINUTE_S / self.per_minute) if self.per_minute else 0.0


@dataclass(slots=True)
class KeyUsage:
    """Of one key, since this gateway started."""

    name: str
    limits: KeyLimits
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    running: int = 0
    _requests: Bucket = field(init=False)
    _tokens: Bucket = field(init=False)

    def __post_init__(self) -> None:
        self.become(self.limits)

    def become(self, limits: KeyLimits) -> None:
        """The key has other limits from now on."""
        self.limits = limits
        self._requests = Bucket(limits.requests_per_minute)
        self._tokens = Bucket(limits.tokens_per_minute)

    def begin(self, now: float) -> None:
        """A request comes; `end` follows. Raises ApiError 429, and then it has not come."""
        limits = self.limits
        self._requests.fill(now)
        self._tokens.fill(now)
        if limits.streams and self.running >= limits.streams:
            self._refuse(
                f"{limits.streams} requests of this API key are running, as many as it may", STREAMS_RETRY_S
            )
        if wait_s := self._requests.wait_s(1):
            self._refuse(f"this API key may send {limits.requests_per_minute} requests a minute", wait_s)
        if wait_s := self._tokens.wait_s(1):
            self._refuse(f"this API key may use {limits.tokens_per_minute} tokens a minute", wait_s)
        self._requests.left -= 1
        self.requests += 1
        self.running += 1

    def end(self) -> None:
        self.running -= 1

    def charge(self, prompt_tokens: int, generation_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += generation_tokens
        self._tokens.left -= prompt_tokens + generation_tokens

    def _refuse(self, text: str, wait_s: float) -> None:
        self.refused += 1
        raise ApiError(429, f"{text}: try again in {wait_s:.3g} s", retry_after_s=wait_s)
