"""grpc.aio as production code uses it, over the simulated network: channels, calls, servers.

Streams of one channel share a connection, so they break together. Messages of etcd are handed over as they are (nobody
changes one after sending it); those of our own services are encoded and decoded by their own codecs.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
from grpc import ChannelConnectivity as State
from grpc import StatusCode as Status

from tests.sim.network import End, Network
from tests.sim.world import Process

PATIENCE_S = (1.5, 4.0)  # pings without an answer, until a connection is given up
ATTEMPT_S = 0.5
BACKOFF_S = 0.05
EOF = grpc.aio.EOF
RAW = "/etcdserverpb."


def rpc_error(code: Status, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


class Box:
    """A queue between callbacks and one reading coroutine."""

    def __init__(self, process: Process) -> None:
        self.items: deque[Any] = deque()
        self.ended: BaseException | None = None
        self.at_end = False
        self._process = process
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        self.items.append(item)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        if not self.at_end:
            self.at_end, self.ended = True, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> Any:
        while not self.items:
            if self.at_end:
                if self.ended is not None:
                    raise self.ended
                return EOF
            self._waiter = self._process.loop.create_future()
            await self._waiter
        return self.items.popleft()


class SimChannel:
    """The client's side: connects when asked for, and again after a failure."""

    def __init__(self, net: Network, process: Process, address: str) -> None:
        self.net = net
        self.process = process
        self.calls: dict[int, Call] = {}
        self.end: End | None = None
        self.state = State.IDLE
        self._address = address
        self._next = 0
        self._retry_at = 0.0
        self._waiters: list[asyncio.Future[None]] = []

    async def __aenter__(self) -> SimChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        self._set(State.SHUTDOWN)
        if self.end is not None:
            self.end.close()
        for call in list(self.calls.values()):
            call.finish(asyncio.CancelledError())

    def get_state(self, try_to_connect: bool = False) -> State:
        if try_to_connect:
            self.connect()
        return self.state

    async def wait_for_state_change(self, last: State) -> None:
        while self.state is last:
            waiter = self.process.loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def unary_unary(self, path: str, **codec: Any) -> Callable[..., Any]:
        async def unary(request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
            call = Call(self, path, codec, metadata)
            timer = None
            if timeout is not None:
                timer = self.process.loop.call_later(timeout, call.too_late)
            try:
                call.send(request)
                reply = await call.box.take()
                if reply is EOF:
                    raise rpc_error(Status.INTERNAL, "no answer")
                return reply
            finally:
                if timer is not None:
                    timer.cancel()
                call.cancel()

        return unary

    def stream_stream(self, path: str, **codec: Any) -> Callable[..., Call]:
        def stream(requests: Any = None, metadata: Any = ()) -> Call:
            call = Call(self, path, codec, metadata)
            if requests is not None:
                call.feed(requests)
            return call

        return stream

    def unary_stream(self, path: str, **_codec: Any) -> Callable[..., Call]:
        """Only snapshots of etcd come so, and no process of the cluster asks for one."""

        def none(*_arguments: Any, **_options: Any) -> Call:
            raise NotImplementedError(path)

        return none

    # Within this module.

    def connect(self) -> None:
        """Begin to connect unless that is done, or is to wait."""
        now = self.net.world.now
        if self.state is State.IDLE or (self.state is State.TRANSIENT_FAILURE and now >= self._retry_at):
            self._set(State.CONNECTING)
            low, high = PATIENCE_S
            patience_s = low + (high - low) * self.net.world.random.random()
            end = self.end = self.net.dial(self.process, self._address, patience_s, self._opened)
            end.receive, end.down = self._receive, self._down
            self.process.loop.call_later(ATTEMPT_S, self._give_up, end)

    def register(self, call: Call) -> int:
        self._next += 1
        self.calls[self._next] = call
        return self._next

    def _give_up(self, end: End) -> None:
        if self.end is end and self.state is State.CONNECTING:
            end.close()
            self._down("connection timed out")

    def _opened(self) -> None:
        self._set(State.READY)
        for call in list(self.calls.values()):
            call.opened()

    def _receive(self, item: tuple[Any, ...]) -> None:
        call = self.calls.get(item[1])
        if call is None:
            return
        if item[0] == "message":
            call.received(item[2])
        elif item[0] == "metadata":
            call.answered(item[2])
        else:
            code, details = item[2]
            call.finish(None if code is Status.OK else rpc_error(code, details))

    def _down(self, reason: str) -> None:
        if self.state is State.SHUTDOWN:
            return
        was_up = self.state is State.READY
        self._set(State.IDLE if was_up else State.TRANSIENT_FAILURE)
        self._retry_at = self.net.world.now + BACKOFF_S
        for call in list(self.calls.values()):
            call.finish(rpc_error(Status.UNAVAILABLE, reason))

    def _set(self, state: State) -> None:
        self.state = state
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Call:
    """One call on a channel, unary or a stream."""

    def __init__(self, channel: SimChannel, path: str, codec: dict[str, Any], metadata: Any) -> None:
        raw = path.startswith(RAW)
        self.box = Box(channel.process)
        self._encode = None if raw else codec["request_serializer"]
        self._decode = None if raw else codec["response_deserializer"]
        self._channel = channel
        self._path = path
        self._metadata = tuple(metadata or ())
        self._unsent: list[Any] = []
        self._is_open = False
        self._connected: asyncio.Future[None] = channel.process.loop.create_future()
        self._answer: asyncio.Future[dict[str, str]] = channel.process.loop.create_future()
        self._feeder: asyncio.Task[None] | None = None
        self._id = channel.register(self)
        if channel.state is State.SHUTDOWN:
            self.finish(rpc_error(Status.CANCELLED, "Channel is closed"))
        elif channel.state is State.READY:
            self.opened()
        else:
            channel.connect()
            if channel.state is State.TRANSIENT_FAILURE:
                self.finish(rpc_error(Status.UNAVAILABLE, "failed to connect"))

    async def wait_for_connection(self) -> None:
        await asyncio.shield(self._connected)

    async def initial_metadata(self) -> dict[str, str]:
        """The server's; empty if the call ended without any."""
        return await asyncio.shield(self._answer)

    async def read(self) -> Any:
        return await self.box.take()

    async def write(self, message: Any) -> None:
        if self.box.at_end:
            raise self.box.ended or asyncio.InvalidStateError("RPC already finished.")
        self.send(message)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (message := await self.box.take()) is not EOF:
            yield message

    def cancel(self) -> None:
        if not self.box.at_end:
            if self._is_open and self._channel.end is not None:
                self._channel.end.send(("cancel", self._id, None))
            self.finish(asyncio.CancelledError())

    def feed(self, requests: AsyncIterator[Any]) -> None:
        self._feeder = self._channel.process.loop.create_task(self._feed(requests))

    async def _feed(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            await self.write(request)

    # For the channel.

    def send(self, message: Any) -> None:
        data = message if self._encode is None else self._encode(message)
        if self._is_open and self._channel.end is not None:
            self._channel.end.send(("message", self._id, data))
        else:
            self._unsent.append(data)

    def opened(self) -> None:
        end = self._channel.end
        if self._is_open or end is None:
            return
        self._is_open = True
        end.send(("open", self._id, (self._path, self._metadata)))
        for data in self._unsent:
            end.send(("message", self._id, data))
        self._unsent.clear()
        if not self._connected.done():
            self._connected.set_result(None)

    def received(self, data: Any) -> None:
        self.box.put(data if self._decode is None else self._decode(data))

    def answered(self, metadata: Any) -> None:
        if not self._answer.done():
            self._answer.set_result(dict(metadata))

    def too_late(self) -> None:
        self.finish(rpc_error(Status.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def finish(self, error: BaseException | None) -> None:
        self._channel.calls.pop(self._id, None)
        self.box.end(error)
        self.answered(())
        if not self._connected.done():
            if isinstance(error, Exception):
                self._connected.set_exception(error)
                self._connected.exception()  # nobody need be waiting for it
            else:
                self._connected.cancel()
        if self._feeder is not None:
            self._feeder.cancel()


class Abort(Exception):
    """What context.abort raises in a handler."""


class Context:
    """The server's side of one call."""

    def __init__(self, process: Process, end: End, call: int, metadata: Any, handler: Any) -> None:
        self.box = Box(process)
        self.task: asyncio.Task[None] | None = None
        self._end = end
        self._call = call
        self._metadata = metadata
        self._handler = handler

    def invocation_metadata(self) -> Any:
        return self._metadata

    async def read(self) -> Any:
        return await self.box.take()

    async def write(self, message: Any) -> None:
        encode = self._handler.response_serializer
        self._end.send(("message", self._call, message if encode is None else encode(message)))

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._end.send(("metadata", self._call, metadata))

    async def abort(self, code: Status, details: str) -> None:
        self._end.send(("end", self._call, (code, details)))
        raise Abort(details)

    async def requests(self) -> AsyncIterator[Any]:
        while (message := await self.box.take()) is not EOF:
            yield message

    async def serve(self) -> None:
        behaviour = self._handler.stream_stream
        try:
            if inspect.isasyncgenfunction(behaviour):
                async for message in behaviour(self.requests(), self):
                    await self.write(message)
            else:
                await behaviour(self.requests(), self)
        except Abort:
            return
        self._end.send(("end", self._call, (Status.OK, "")))


class SimServer:
    """The server of our own two services."""

    def __init__(self, net: Network, process: Process) -> None:
        self._net = net
        self._process = process
        self._address = ""
        self._handlers: list[Any] = []
        self._ends: dict[End, dict[int, Context]] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._handlers.extend(handlers)

    def add_insecure_port(self, address: str) -> int:
        if address.startswith("unix:"):
            self._address = address
            return 1
        self._address = self._net.address()
        return int(self._address.rpartition(":")[2])

    async def start(self) -> None:
        self._net.listen(self._address, self._process, self._accept)

    async def stop(self, grace: float | None) -> None:
        self._net.unlisten(self._address)
        for end in list(self._ends):
            end.close()
            self._lost(end)

    def _accept(self, end: End) -> None:
        calls: dict[int, Context] = {}
        self._ends[end] = calls
        end.receive = lambda item: self._receive(end, calls, item)
        end.down = lambda _: self._lost(end)

    def _receive(self, end: End, calls: dict[int, Context], item: tuple[Any, ...]) -> None:
        what, call, payload = item
        if what == "open":
            path, metadata = payload
            handler = next(
                h for each in self._handlers if (h := each.service(SimpleNamespace(method=path))) is not None
            )
            context = calls[call] = Context(self._process, end, call, metadata, handler)
            context.task = self._process.spawn(context.serve())
            context.task.add_done_callback(lambda _: calls.pop(call, None))
            return
        context = calls.get(call)  # type: ignore[assignment]
        if context is None or context.task is None:
            return
        if what == "cancel":
            context.task.cancel()
        else:
            decode = context._handler.request_deserializer
            context.box.put(payload if decode is None else decode(payload))

    def _lost(self, end: End) -> None:
        """grpc cancels the handlers of a broken connection."""
        for context in self._ends.pop(end, {}).values():
            if context.task is not None:
                context.task.cancel()
