"""Which group a stream is of: its id does not say, so all of them are asked."""

from __future__ import annotations

import asyncio

from web.gateway.resume.find_logs import find_logs
from web.gateway.resume.start_or_resume import LOOK_BODILESS_S, Visit, read_ticket
from web.gateway.service import Service
from web.gateway.services import Services


async def group_of_stream(services: Services, stream: str, visit: Visit) -> Service:
    """The service whose schedulers know the stream; if none does, one that could not ask all of its own, else the
    first. Raises ApiError for what is no stream."""
    if len(services.all) == 1:
        return services.first
    ticket, cursor = read_ticket(services.first, visit.last_event_id or stream, visit)
    asked = {
        asyncio.create_task(find_logs(service, ticket.nonce, cursor, LOOK_BODILESS_S)): service
        for service in services.all
    }
    unsure: list[Service] = []
    waiting = set(asked)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                logs, sure = task.result()
                if any(log is not None for log in logs.values()):
                    return asked[task]
                if not sure:
                    unsure.append(asked[task])
    finally:
        for task in waiting:
            task.cancel()
    return unsure[0] if unsure else services.first
