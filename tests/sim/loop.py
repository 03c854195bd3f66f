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
import traceback
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any

UNIX_S = 1_700_000_000.0
READY_MAX = 100_000  # callbacks of one process without virtual time passing: it would never stop
COMPUTE_S = 0.004  # what is given to a thread takes up to so long


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
        self.part: Any = None  # the production object that the process is about
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
        world, loop = self.world, self.loop
        world.current = self
        events._set_running_loop(loop)
        try:
            if args is None:
                call._run()
            else:
                call(*args)
            ready, turns = loop.ready, 0
            while ready and self.alive:
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._run()
                turns += 1
                if turns > READY_MAX:
                    raise Violation(f"{self} never comes to rest")
        except Exception as error:
            world.fail(f"{self}: {describe(error)}")
        finally:
            events._set_running_loop(None)
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
            for _ in range(
                20
            ):  # a coroutine may await in its `finally`, which close() takes for disobedience
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


def describe(error: BaseException) -> str:
    """An exception with where it was raised, on one line for each frame."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {error} ({where})"


class SimLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as production code uses, in virtual time."""

    def __init__(self, world: World, process: Process) -> None:
        self.ready: deque[asyncio.Handle] = deque()
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self._world = world
        self._process = process

    def time(self) -> float:
        return self._world.now + self._process.monotonic_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        if self._world.current is not self._process:
            self._process.kick()
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        world = self._world
        world.push(max(world.now, when - self._process.monotonic_s), self._process, timer, None)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # it is passed over when its time comes

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        self.tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Done at the end of a random while, which is the worst moment: all may have changed since the call."""
        future = self.create_future()

        def finish() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(self._world.random.random() * COMPUTE_S, finish)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = describe(error) if error is not None else str(context.get("message"))
        if self._process.alive:
            self._world.fail(f"{self._process}: {text}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return not self._process.alive


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
        heap, after = self._heap, self.after
        while heap and not self.failure:
            when, _, process, call, args = heap[0]
            if when > until:
                break
            heapq.heappop(heap)
            if not process.alive or (args is None and call._cancelled):
                continue
            self.now = when
            self.events += 1
            self.digest = hash((self.digest, when))
            process.run(call, args)
            if after is not None:
                after(process)
        self.now = max(self.now, until)

    def monotonic(self) -> float:
        return self.now + (self.current.monotonic_s if self.current is not None else 0.0)

    def unix(self) -> float:
        return UNIX_S + self.now + self.wall_jump_s

    def close(self) -> None:
        self._heap.clear()
        for process in self.processes:
            # Cleaning up may ask for the loop; whatever it sends goes nowhere.
            self.current = process
            events._set_running_loop(process.loop)
            try:
                process.close()
            finally:
                events._set_running_loop(None)
        self.processes.clear()


@contextlib.contextmanager
def virtual_time(world: World) -> Iterator[None]:
    """Everybody who asks for the time, or draws from the module `random`, gets the world's."""
    real = time.monotonic, time.time
    state = random.getstate()
    unraisable = sys.unraisablehook
    time.monotonic, time.time = world.monotonic, world.unix
    random.seed(world.random.getrandbits(32))
    try:
        yield
    finally:
        sys.unraisablehook = lambda _: None  # coroutines of killed processes have nobody to complain to
        world.close()
        sys.unraisablehook = unraisable
        time.monotonic, time.time = real
        random.setstate(state)
