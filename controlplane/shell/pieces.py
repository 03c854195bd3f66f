"""Long work on the event loop that gives way: a generator that yields after each small piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

TURN_S = 0.002  # a heartbeat, or the news of a death, waits this long at most


async def finish(pieces: Generator[None, None, T]) -> T:
    """The generator's result. Everybody else on the loop gets a turn after every `TURN_S` of it."""
    while True:
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            try:
                next(pieces)
            except StopIteration as done:
                result: T = done.value
                return result
        await asyncio.sleep(0)
