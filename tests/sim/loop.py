"""An event loop in virtual time for one process, over the heap that the whole world shares (world.py)."""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.world import Process, World

COMPUTE_S = 0.004  # what is given to a thread takes up to so long


def describe(error: BaseException) -> str:
    """An exception with where it was raised, on one line for each frame."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {error} ({where})"


class Handle:
    """What asyncio.Handle is, without a context: production code has no context variables, and copies cost time."""

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., Any] | None = callback  # None: cancelled
        self.args = args

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None


class Timer(Handle):
    __slots__ = ("_when",)

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], when: float) -> None:
        self.callback = callback
        self.args = args
        self._when = when

    def when(self) -> float:
        return self._when


class SimLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as production code uses, in virtual time."""

    get_debug = bool  # False, without a call of Python for every future and task

    def __init__(self, world: World, process: Process) -> None:
        self.ready: deque[Handle] = deque()
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self._world = world
        self._process = process

    def time(self) -> float:
        return self._world.now + self._process.monotonic_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Handle:
        handle = Handle(callback, args)
        self.ready.append(handle)
        if self._world.current is not self._process:
            self._process.kick()
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Timer:
        world, process = self._world, self._process
        timer = Timer(callback, args, world.now + process.monotonic_s + delay)
        world.push(max(world.now, timer._when - process.monotonic_s), process, timer, None)
        return timer

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> Timer:
        timer = Timer(callback, args, when)
        world = self._world
        world.push(max(world.now, when - self._process.monotonic_s), self._process, timer, None)
        return timer  # a cancelled one is passed over when its time comes

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

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return not self._process.alive
