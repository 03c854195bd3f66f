"""The life of one request at one gateway, as operators ask for it: where it went, every pause with its cause, its end.

Never a prompt, never a token's value."""

from __future__ import annotations

import msgspec

PLACES_MAX = 32  # of one request; what is beyond is counted
PAUSES_MAX = 64
CAUSE_CHARS_MAX = 300


class Place(msgspec.Struct, frozen=True):
    """A choice was sent to a scheduler."""

    at_s: float  # after the request began
    choice: int
    pipeline: str
    node: str
    epoch: int


class Pause(msgspec.Struct, frozen=True):
    """A choice had no token for a while, and why."""

    at_s: float  # after the request began: when it ended, with a token
    lasted_s: float
    choice: int
    how: str  # it went on: resubmitted, continued, moved, resumed; slow: nothing befell it
    pipeline: str  # that brought the token
    epoch: int
    cause: str  # in words


class Life(msgspec.Struct, frozen=True):
    """One connection of a client. A stream that goes on at another gateway has one there, with the same `request`."""

    request: str  # the id in the answer, without its prefix
    gateway: str
    kind: str  # completion, chat, responses
    key: str  # name of the API key
    model: str
    stream: bool
    resumed: bool  # it went on with what another connection had begun
    choices: int
    prompt_tokens: int
    began_unix_s: float
    sent_s: float | None = None  # from the beginning until it was sent to a scheduler: before, it waited here
    first_token_s: float | None = None  # from the beginning; from `sent_s` on: queued there, and prefilled
    lasted_s: float | None = None  # None: it runs
    tokens: int = 0
    status: int = 0  # of HTTP; 499: its client left. 0: it runs
    end: str = ""  # how it ended, in words
    places: tuple[Place, ...] = ()
    pauses: tuple[Pause, ...] = ()
    left_out: int = 0  # places and pauses beyond the bounds
    pause_max_s: float = 0.0  # of all pauses
    trace: str = ""  # the client's `traceparent`, if it sent one


class Lives(msgspec.Struct, frozen=True):
    """What gateways know of one request: one of them, or all together."""

    request: str
    lives: tuple[Life, ...]  # oldest first
    silent: tuple[str, ...] = ()  # gateways that did not answer in time
