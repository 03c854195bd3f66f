"""Long work on the event loop that gives way (core/pieces.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TypeVar

from controlplane.core.pieces import Pieces

T = TypeVar("T")

TURN_S = 0.002  # a heartbeat, or the news of a death, waits this long at most


async def finish(work: Generator[None, None, T]) -> T:
    """The generator's result. Everybody else on the loop gets a turn after every `TURN_S` of it."""
    pieces, until = Pieces(work), time.monotonic() + TURN_S
    for _ in pieces:
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + TURN_S
    return pieces.result
