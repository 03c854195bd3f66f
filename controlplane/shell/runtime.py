"""The controller's heart: one task that feeds events to the core, and performs what it answers.

inbox -> Controller.take(event) ... Controller.ready() -> Performer -> etcd, history
  ^---- registry, reports, leadership, answers of writes ---------'

What came while the last decision was made is taken in together and decided upon once, as in raft's Step and Ready,
and news waits a little for more of it (`Coalescing`). Decisions leave the loop to others for half of the time
(`Allowance`): leases are renewed and reports heard there, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from controlplane.core.controller import Controller
from controlplane.core.events import BecameLeader, CoreEvent, LostLeadership, Tick
from controlplane.etcd.election import Election
from controlplane.shell.allowance import Allowance
from controlplane.shell.coalescing import Coalescing
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry

log = structlog.get_logger()

TICK_S = 0.05
# A timer may ring a rounding step before its time. To wait for the rest would be to ask again and again in no time.
EARLY_S = 0.001
TAKEN_MAX = 1024  # events between two decisions

T = TypeVar("T")


class Runtime:
    """Owns the loop. Any exception of the core ends it: a defect there must not go on deciding."""

    def __init__(
        self,
        controller: Controller,
        inbox: Inbox,
        registry: Registry,
        performer: Performer,
        election: Election,
    ) -> None:
        self.steps = 0  # events taken in
        self.decisions = 0
        self.step_s_max = 0.0
        self.terms = 0
        self._controller = controller
        self._inbox = inbox
        self._registry = registry
        self._performer = performer
        self._election = election
        self._allowance = Allowance()
        self._coalescing = Coalescing()

    @property
    def is_leader(self) -> bool:
        leadership = self._performer.leadership
        return leadership is not None and leadership.valid()

    async def run(self) -> None:
        """Until cancelled: take in what has come, decide once. A tick every `TICK_S`, however much comes."""
        next_tick = time.monotonic()
        while True:
            started = time.monotonic()
            if started >= next_tick - EARLY_S:
                # Counted from now: after a pause one tick is enough, and the core sees the gap by its `now`.
                next_tick = started + TICK_S
                self._take(Tick())
            for _ in range(TAKEN_MAX):
                event = self._inbox.pop()
                if event is None:
                    break
                self._take(event)
            now, due_at = time.monotonic(), self._allowance.free_at
            if news := self._controller.news:
                due_at = max(due_at, self._coalescing.due_at(now, news, self._controller.writing))
            if now >= due_at:
                await self._decide(started)
                due_at = next_tick
            if len(self._inbox):
                await asyncio.sleep(0)  # let those in who fill it
            else:
                await self._inbox.wait(min(next_tick, due_at) - time.monotonic())

    async def _decide(self, started: float) -> None:
        """`started`: when the events that this decides about began to be taken in."""
        began = time.monotonic()
        effects = self._controller.ready(began, time.time())
        ended = time.monotonic()
        self._allowance.spend(began, ended)
        self._coalescing.decided(began, ended, bool(effects))
        self.decisions += 1
        self.step_s_max = max(self.step_s_max, ended - started)
        for effect in effects:
            await self._performer.put(effect)

    def _take(self, event: CoreEvent) -> None:
        self._controller.take(event, time.monotonic(), time.time())
        self.steps += 1

    async def campaign(self) -> None:
        """Until cancelled: stand for election, lead, stand again; not while something forbids it (`obstacle`)."""
        # The core must know the cluster before it leads: see controlplane/core/events.py.
        await self._registry.synced.wait()
        while True:
            await self._registry.may_lead()
            leadership = await self._unless_blocked(self._election.campaign())
            if leadership is None:
                continue
            self.terms += 1
            self._performer.leadership = leadership
            log.info("leading", key=leadership.key)
            self._inbox.put_own(BecameLeader())
            await self._unless_blocked(leadership.lost.wait())
            if not leadership.lost.is_set():
                leadership.give_up(self._registry.obstacle)
            log.warning("no longer leading", reason=leadership.lost_reason)
            self._performer.leadership = None
            self._inbox.put_own(LostLeadership())
            await leadership.resign()  # its key must not stand in the way of the next candidate

    async def _unless_blocked(self, waiting: Coroutine[Any, Any, T]) -> T | None:
        """What is waited for; None, and that is cancelled, if an obstacle to leading comes first."""
        wanted = asyncio.create_task(waiting)
        blocked = asyncio.create_task(self._registry.blocked.wait())
        try:
            await asyncio.wait({wanted, blocked}, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return wanted.result()
        finally:
            blocked.cancel()
            wanted.cancel()  # a candidacy is withdrawn so
            await asyncio.gather(wanted, blocked, return_exceptions=True)
        return None

    async def resign(self) -> None:
        """Hand leadership over at once. After `campaign` was cancelled."""
        leadership, self._performer.leadership = self._performer.leadership, None
        if leadership is not None:
            await leadership.resign()
