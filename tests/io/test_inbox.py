"""The inbox in front of the controller: what wakes it."""

from __future__ import annotations

import asyncio

from controlplane.core.events import Tick
from controlplane.shell.inbox import Inbox


def test_what_is_no_news_waits_for_more_of_its_kind_and_news_does_not() -> None:
    async def main() -> None:
        inbox = Inbox()
        waiting = asyncio.create_task(inbox.wait(60.0))
        await asyncio.sleep(0)
        await inbox.put(Tick(), calm=True)
        await inbox.put(Tick(), calm=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
        await inbox.put(Tick())
        await waiting
        assert len(inbox) == 3
        while inbox.pop():
            pass
        await inbox.put(Tick(), calm=True)
        assert await inbox.get(60.0) == Tick()
        waiting = asyncio.create_task(inbox.wait(60.0))
        await asyncio.sleep(0)
        await inbox.put(Tick(), calm=True)
        await waiting  # nobody else comes: it does not wait for ever

    asyncio.run(main())
