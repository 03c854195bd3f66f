"""What schedulers have of a stream's choices: all of them are asked for each, so as little as possible is asked for."""

from __future__ import annotations

import asyncio
import time

from controlplane.contract.requests import Log
from web.gateway.resume.cursor import Cursor
from web.gateway.resume.tickets import rid_of
from web.gateway.service import Service

LEAST_S = 0.25  # for the second question


async def find_logs(
    service: Service, nonce: bytes, cursor: Cursor, limit_s: float
) -> tuple[dict[int, Log | None], bool]:
    """By choice, and whether every scheduler was asked. If the first choice that is asked for is known, it is the only
    one: its context says how many there are, which an event id may have wrong."""
    choices = range(max(1, len(cursor.marks)))
    # What the client has all of may have been dropped while others run.
    order = sorted(choices, key=cursor.has_all)
    until = time.monotonic() + limit_s
    found: dict[int, Log | None] = {}
    sure = True
    for some in (order[:1], order[1:]):
        left_s = max(LEAST_S, until - time.monotonic())
        logs, certain = await recall(service, [rid_of(nonce, choice) for choice in some], left_s)
        found |= zip(some, logs, strict=True)
        sure = sure and certain
        if any(log is not None for log in logs):
            break
    return found, sure


async def recall(service: Service, rids: list[int], limit_s: float) -> tuple[list[Log | None], bool]:
    found = await asyncio.gather(*(service.dispatcher.recall(rid, limit_s) for rid in rids))
    return [log for log, _ in found], all(sure for _, sure in found)
