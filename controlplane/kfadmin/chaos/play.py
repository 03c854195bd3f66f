"""Plays a game day: the clock, the looks, the load and the harm around `GameDay`, which decides."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.incidents import Incident
from controlplane.kfadmin.chaos.gameday import (
    Begin,
    Begun,
    CalledOff,
    Effect,
    Event,
    Failed,
    Finish,
    GameDay,
    Looked,
    Suffered,
    Undo,
    Undone,
)
from controlplane.kfadmin.chaos.load import Load
from controlplane.kfadmin.chaos.perform import Performer
from controlplane.kfadmin.chaos.plan import Plan
from controlplane.kfadmin.chaos.report import Report, made
from controlplane.kfadmin.chaos.sight import look
from controlplane.kfadmin.client import AdminClient, Refused, Unreachable
from controlplane.kfadmin.loadgen import LoadGenerator, sample_prompts
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import RunDir, admin_endpoints

LOOK_S = 0.25
INCIDENTS_READ = 1000


class Player:
    """One game day of the cluster in a run directory."""

    def __init__(self, run_dir: RunDir, plan: Plan) -> None:
        known = run_dir.endpoints()
        self._plan = plan
        self._watching = AdminClient(admin_endpoints(known), run_dir.admin_token(), ca=known.ca)
        self._asking = AdminClient(admin_endpoints(known), run_dir.admin_token(), ca=known.ca)
        self._performer = Performer(run_dir, self._asking)
        self._names = self._performer.names()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        status = self._watching.status()
        self._cluster = f"{status.cluster}/{status.group}"
        self._model = status.model
        # Also where there is one gateway: a stream goes on when it has been started again.
        generator = LoadGenerator(
            known.gateways[0],
            run_dir.api_key(),
            status.model,
            known.gateways[1:] + known.gateways[:1],
            known.ca,
        )
        prompts = sample_prompts(plan.streams, plan.tokens)
        self._load = Load(generator, prompts, plan.pause_max_s, self._suffered)

    async def play(self) -> Report:
        """Raises Refused when the cluster is not home, and then nothing was done."""
        with _called_off(lambda: self._events.put_nowait(CalledOff())):
            try:
                await self._home()
                progress(f"{self._plan.streams} streams of {self._plan.tokens} tokens, undisturbed")
                await self._load.learn()
                return await self._day()
            finally:
                await self._close()

    async def _home(self) -> None:
        """Wait until a fault could begin."""
        until = time.monotonic() + self._plan.home_max_s
        while True:
            looked = await self._look()
            if looked.sight is not None and looked.sight.home:
                return
            if time.monotonic() > until or not self._events.empty():
                why = looked.why if looked.sight is None else looked.sight.why
                raise Refused(f"the cluster is not as it should be, and no fault was begun: {why}")
            await asyncio.sleep(LOOK_S)

    async def _day(self) -> Report:
        began, began_unix_s = time.monotonic(), time.time()
        day = GameDay(self._plan, self._names, began)
        running = asyncio.create_task(self._load.run(day.courses))
        try:
            await self._course(day, running)
            self._load.stop()
            progress("no more faults; the streams come to their ends")
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        incidents = await self._incidents()
        ended = time.monotonic()
        return made(
            self._plan, day, self._load, (began, began_unix_s, ended), (self._cluster, self._model), incidents
        )

    async def _course(self, day: GameDay, running: asyncio.Task[None]) -> None:
        """Until the day is finished. Raises what ended the load."""
        look_at = 0.0
        while not day.finished:
            if running.done():
                await running
                raise KevlarFlowError("the load ended by itself")
            self._load.look(time.monotonic())
            while not self._events.empty():
                self._perform(day.step(self._events.get_nowait(), time.monotonic()))
            if time.monotonic() >= look_at and self._events.empty():
                looked = await self._look()
                # What has come meanwhile was before the look's end, and what it shows may be older: look again.
                if self._events.empty():
                    self._perform(day.step(looked, time.monotonic()))
                look_at = time.monotonic() + LOOK_S
            await asyncio.sleep(0.02)

    async def _look(self) -> Looked:
        pids = self._performer.pids()
        try:
            status = await asyncio.to_thread(self._watching.status)
        except Unreachable as error:
            return Looked(None, str(error))
        return Looked(look(status, pids, self._names))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Begin(number, kind, target):
                    progress(f"fault {number}: {kind.value} {target}")
                    self._spawn(self._begin(effect))
                case Undo(number, kind, target):
                    progress(f"fault {number}: end of {kind.value} {target}")
                    self._spawn(self._undo(effect))
                case Finish(why):
                    progress(f"CALLED OFF: {why}" if why else "all faults are over")

    async def _begin(self, effect: Begin) -> None:
        try:
            await self._performer.begin(effect)
        except (KevlarFlowError, OSError) as error:
            progress(f"fault {effect.number} did not begin: {error}")
            self._events.put_nowait(Failed(effect.number, str(error)))
        else:
            self._events.put_nowait(Begun(effect.number))

    async def _undo(self, effect: Undo) -> None:
        try:
            await self._performer.undo(effect)
        except (KevlarFlowError, OSError) as error:
            self._events.put_nowait(Failed(effect.number, str(error)))
        else:
            self._events.put_nowait(Undone(effect.number))

    def _spawn(self, doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _suffered(self, why: str) -> None:
        progress(f"SUFFERED: {why}")
        self._events.put_nowait(Suffered(why))

    async def _incidents(self) -> list[Incident]:
        try:
            return await asyncio.to_thread(self._watching.incidents, INCIDENTS_READ)
        except KevlarFlowError as error:
            progress(f"the report has no phases: {error}")
            return []

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._performer.close()
        self._watching.close()
        self._asking.close()


@contextlib.contextmanager
def _called_off(act: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
