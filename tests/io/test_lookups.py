"""Asking gateways for the life of a request through their reports of figures, over real gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from controlplane.contract.errors import Unavailable
from controlplane.contract.figures import WANTED_MAX
from controlplane.contract.ids import Member
from controlplane.contract.lives import Life, Lives
from controlplane.shell.lookups import Lookups
from tests.io.test_figures import TOKEN, Measured
from web.gateway import figures as gateway
from web.gateway.figures import FiguresReporter
from web.gateway.metrics import Metrics


def life(request: str, name: str, began: float) -> Life:
    return Life(request, name, "chat", "alice", "m", True, False, 1, 7, began)


def test_gateways_answer_with_their_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "PERIOD_S", 0.05)

    async def main() -> None:
        async with Measured(tmp_path) as measured:
            known = {"g1": [life("r", "g1", 2.0)], "g2": [life("r", "g2", 1.0)]}

            def reporter(name: str) -> FiguresReporter:
                return FiguresReporter(
                    Member(name, "a"),
                    TOKEN,
                    Metrics(),
                    lambda: {"c1": measured.address},
                    find=lambda request: known[name] if request == "r" else [],
                )

            reporting = [asyncio.create_task(reporter(name).run()) for name in known]
            lookups = measured.recorder.lookups
            found, same = await asyncio.gather(*(lookups.find("r", ["g1", "g2"], 20.0) for _ in range(2)))
            assert [one.gateway for one in found.lives] == ["g2", "g1"]
            assert (found.silent, same) == ((), found)
            assert await lookups.find("nobody's", ["g1", "g2"], 20.0) == Lives("nobody's", ())
            away = await lookups.find("r", ["g1", "g3"], 1.0)
            assert ([one.gateway for one in away.lives], away.silent) == (["g1"], ("g3",))
            assert lookups.wanted("g3") == ()  # nobody asks any more
            for task in reporting:
                task.cancel()
            await asyncio.gather(*reporting, return_exceptions=True)

    asyncio.run(main())


def test_no_more_than_so_many_at_a_time_and_no_gateway_no_wait() -> None:
    async def main() -> None:
        lookups = Lookups()
        assert await lookups.find("r", []) == Lives("r", ())
        waiting = [asyncio.create_task(lookups.find(f"r{k}", ["g1"], 20.0)) for k in range(WANTED_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await lookups.find("one more", ["g1"])
        lookups.heard("g1", [Lives(request, ()) for request in lookups.wanted("g1")])
        lookups.heard("g1", [Lives("r0", (life("r0", "g1", 1.0),))])  # twice
        assert [found.lives for found in await asyncio.gather(*waiting)] == [()] * WANTED_MAX

    asyncio.run(main())
