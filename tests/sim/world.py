"""Virtual time: processes with an event loop and clocks of their own, in one thread and in one fixed order.

Every process runs unmodified asyncio code. Its loop takes from one heap that the whole world shares, so a seed gives
the same run each time. A killed process just never runs again; a stopped one finds everything that came meanwhile
waiting, in order, when it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import sys
import time
from asyncio import events, tasks
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from controlplane.contract import schema
from tests.sim.loop import SimLoop, describe

SCHEMA = schema.SCHEMA
# Versions of the code: this one, one that writes fields which this one does not know, and one whose values this one
# must not rewrite.
OURS, NEWER, NEWER_SCHEMA = range(3)
UNIX_S = 1_700_000_000.0
READY_MAX = 100_000  # callbacks of one process without virtual time passing: it would never stop


class Violation(AssertionError):
    """An invariant of the design does not hold, or a task of production code ended with an exception."""


class Process:
    """One process of one machine. `post`ed calls run in it one at a time; `spawn`ed coroutines on its loop."""

    def __init__(self, world: World, name: str, incarnation: str = "") -> None:
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.alive = True
        self.paused = False
        self.monotonic_s = world.random.uniform(10.0, 1e5)  # its machine has been up for so long
        self.loop = SimLoop(world, self)  # type: ignore[abstract]
        self.ends: dict[Any, None] = {}  # of connections, see network.py
        self.exited: Callable[[], None] | None = None  # called when the main coroutine has returned
        self.at_end: list[Callable[[], None]] = []  # called when it ends, whatever ends it
        self.part: Any = None  # the production object that the process is about
        self.fenced = False  # it ended because another process has its name
        self.code = OURS  # its version of the code
        self._held: list[tuple[Any, Any]] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def __repr__(self) -> str:
        return f"{self.name}@{self.incarnation}"

    def spawn(self, coroutine: Coroutine[Any, Any, Any], main: bool = False) -> asyncio.Task[Any]:
        """Run a coroutine. One that raises is a violation; the end of `main` is the end of the process."""
        task = self.loop.create_task(coroutine)
        task.add_done_callback(self._main_done if main else self._done)
        self.kick()
        return task

    def kick(self) -> None:
        """Let what is ready run soon (needed after a call from outside of the process)."""
        self.world.post(0.0, self, _nothing)

    def run(self, call: Any, args: tuple[Any, ...] | None) -> None:
        """One turn: the call, or the timer's handle if `args` is None, and all that is ready then."""
        if self.paused:
            self._held.append((call, args))
            return
        world, ready = self.world, self.loop.ready
        world.enter(self)
        try:
            if args is None:
                call.callback(*call.args)
            else:
                call(*args)
            turns = 0
            while ready and self.alive:
                handle = ready.popleft()
                if (callback := handle.callback) is not None:
                    callback(*handle.args)
                turns += 1
                if turns > READY_MAX:
                    raise Violation(f"{self} never comes to rest")
        except Exception as error:
            world.fail(f"{self}: {describe(error)}")
        finally:
            world.current = None

    def resume(self) -> None:
        self.paused = False
        held, self._held = self._held, []
        for call, args in held:
            self.world.push(self.world.now, self, call, args)

    def close(self) -> None:
        """End what is still suspended, now rather than when the garbage collector comes by."""
        self.alive = False
        for task in list(self.loop.tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coroutine = task.get_coro()
            # A coroutine may await in its `finally`, which close() takes for disobedience.
            for _ in range(20):
                try:
                    coroutine.close()
                    break
                except (RuntimeError, ValueError):
                    continue
        self.loop.tasks.clear()
        self.loop.ready.clear()
        self._held.clear()
        self.part = self.exited = None

    def _done(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            assert error is not None
            self.world.fail(f"a task of {self} ended: {describe(error)}")

    def _main_done(self, task: asyncio.Task[Any]) -> None:
        self._done(task)
        if self.exited is not None:
            self.exited()


def _nothing() -> None:
    pass


def _forget(_: object) -> None:
    pass


class World:
    """The clock, the heap of what is to come, and the only source of chance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.wall_jump_s = 0.0  # of everybody's wall clock: they are set by one NTP server
        self.current: Process | None = None
        self.failure = ""
        self.events = 0
        self.digest = 0
        self.after: Callable[[Process], None] | None = None  # called after each turn of a process
        self.log: Callable[[str], None] | None = None
        self.processes: list[Process] = []  # all that ever were
        self._heap: list[tuple[float, int, Process, Any, tuple[Any, ...] | None]] = []
        self._seq = 0
        self._entered: Process | None = None

    def process(self, name: str, incarnation: str = "") -> Process:
        process = Process(self, name, incarnation)
        self.processes.append(process)
        return process

    def post(self, delay_s: float, process: Process, call: Callable[..., Any], *args: Any) -> None:
        """Run `call(*args)` in a process, `delay_s` from now."""
        self.push(self.now + delay_s, process, call, args)

    def push(self, when: float, process: Process, call: Any, args: tuple[Any, ...] | None) -> None:
        self._seq += 1
        heapq.heappush(self._heap, (when, self._seq, process, call, args))

    def enter(self, process: Process) -> None:
        """From now on this process runs."""
        self.current = process
        if self._entered is not process:
            self._entered = process
            schema.SCHEMA = SCHEMA + (process.code == NEWER_SCHEMA)

    def leave(self) -> None:
        self.current = self._entered = None

    def running_loop(self) -> SimLoop | None:
        return self.current.loop if self.current is not None else None

    def current_task(self, loop: Any = None) -> asyncio.Task[Any] | None:
        return tasks._current_tasks.get(loop or self.must_run_loop())  # type: ignore[attr-defined]

    def must_run_loop(self, stacklevel: int = 0) -> SimLoop:
        if self.current is None:
            raise RuntimeError("no running event loop")
        return self.current.loop

    def fail(self, what: str) -> None:
        """Note the first violation; the run ends with it."""
        if not self.failure:
            self.failure = f"at {self.now:.4f} s: {what}"
            self.note(f"VIOLATION {what}")

    def note(self, text: str) -> None:
        if self.log is not None:
            self.log(f"{self.now:9.4f}  {text}")

    def run_until(self, until: float) -> None:
        """Let everything happen that happens up to `until`, or up to the first violation."""
        heap, after, pop = self._heap, self.after, heapq.heappop
        while heap and not self.failure and heap[0][0] <= until:
            when, _, process, call, args = pop(heap)
            if not process.alive or (args is None and call.callback is None):
                continue
            self.now = when
            self.events += 1
            self.digest = hash((self.digest, when))
            process.run(call, args)
            if after is not None:
                after(process)
        self.now = max(self.now, until)
        self.leave()

    def monotonic(self) -> float:
        return self.now + (self.current.monotonic_s if self.current is not None else 0.0)

    def unix(self) -> float:
        return UNIX_S + self.now + self.wall_jump_s

    def close(self) -> None:
        self._heap.clear()
        for process in self.processes:
            # Cleaning up may ask for the loop; whatever it sends goes nowhere.
            self.enter(process)
            try:
                process.close()
            finally:
                self.leave()
        self.processes.clear()


@contextlib.contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes of modules and classes have other values within. (mock.patch does more, and takes its time.)"""
    before = [(target, name, getattr(target, name)) for target, name, _ in replacements]
    try:
        for target, name, value in replacements:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in before:
            setattr(target, name, value)


@contextlib.contextmanager
def virtual_time(world: World) -> Iterator[None]:
    """Everybody who asks for the time, or draws from the module `random`, gets the world's."""
    real = time.monotonic, time.time, time.thread_time
    state = random.getstate()
    unraisable = sys.unraisablehook
    time.monotonic, time.time = world.monotonic, world.unix
    time.thread_time = lambda: 0.0  # to compute takes no time
    random.seed(world.random.getrandbits(32))
    try:
        # In Python 3.11, asyncio asks the kernel for the process' id each time that it notes, or is asked for, the
        # running loop. It also keeps weak references to all tasks, which nobody asks for.
        asked = (
            (events, "get_running_loop", world.must_run_loop),
            (events, "_get_running_loop", world.running_loop),
            (events, "_get_event_loop", world.must_run_loop),
            (tasks, "current_task", world.current_task),
            (asyncio, "current_task", world.current_task),
            (asyncio, "get_running_loop", world.must_run_loop),
            (tasks._all_tasks, "add", _forget),  # type: ignore[attr-defined]
        )
        with replaced(asked):
            yield
    finally:
        sys.unraisablehook = lambda _: None  # coroutines of killed processes have nobody to complain to
        world.close()
        sys.unraisablehook = unraisable
        time.monotonic, time.time, time.thread_time = real
        schema.SCHEMA = SCHEMA
        random.setstate(state)
