"""A lease whose owner's loop is busy."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from controlplane.etcd.lease import LeaseKeeper


class Call:
    """A stream of renewals; the answer comes when the test says so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def write(self, _request: Any) -> None:
        self.asked.set()

    async def read(self) -> Any:
        return await self.answer

    def cancel(self) -> None:
        pass


def test_an_answer_counts_in_the_turn_in_which_it_is_read() -> None:
    """Each further turn of a busy loop takes as long as a decision: a lease of two seconds has few of them."""

    async def main() -> None:
        async def connected(_limit_s: float) -> bool:
            return True

        call = Call()
        endpoint = SimpleNamespace(
            connected=connected, lease=SimpleNamespace(LeaseKeepAlive=lambda **_: call)
        )
        endpoints = SimpleNamespace(preferred=endpoint)
        loop = asyncio.get_running_loop()
        keeper = LeaseKeeper(cast(Any, endpoints), 7, 100.0, loop.time())
        try:
            await call.asked.wait()
            assert keeper.remaining_s() < 91.0
            call.answer.set_result(SimpleNamespace(TTL=1000))
            await asyncio.sleep(0)
            assert keeper.remaining_s() > 800.0
        finally:
            await keeper.close()

    asyncio.run(main())
