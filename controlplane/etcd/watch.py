"""A watch over a prefix that never ends silently and knows how old its knowledge is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from controlplane.backoff import Backoff
from controlplane.etcd import wire
from controlplane.etcd.endpoints import HAS_LEADER, Endpoint, Endpoints
from controlplane.etcd.errors import EtcdCompacted, EtcdError, EtcdUnavailable, describe
from controlplane.etcd.proto import rpc_pb2
from controlplane.etcd.values import Snapshot, WatchBatch, WatchEvent

log = logging.getLogger(__name__)

QUEUE_BATCHES_MAX = 1024


@dataclass(frozen=True, slots=True)
class WatchTiming:
    """Seconds. `silence_s` of no answer to progress requests means: try another endpoint."""

    progress_s: float = 1.0
    silence_s: float = 2.0
    connect_s: float = 1.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 1.0


class Watch(AsyncIterator[WatchBatch]):
    """Iterate for batches: a snapshot first, then changes; `aclose` ends it. Made by `EtcdClient.watch_prefix`.

    After any interruption it resumes at the next revision; if that is compacted, or the store went back in
    time, a new snapshot comes. While etcd is away it keeps trying with a bounded back-off and `age_s` grows.
    If the consumer is slow the queue fills, reading stops, and `age_s` grows too: it is what the consumer
    can know.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        prefix: str,
        read: Callable[[str], Awaitable[Snapshot]],
        read_place: Callable[[], Awaitable[tuple[int, int]]],
        timing: WatchTiming,
    ) -> None:
        self.prefix = prefix
        self.revision = 0  # of the last batch queued
        self.reconnects = 0
        self.last_error = ""
        self._endpoints = endpoints
        self._read = read
        self._read_place = read_place
        self._cluster_id = 0  # of the store that `revision` counts in; 0: not known yet
        self._timing = timing
        self._started_at = time.monotonic()
        self._heard_at: float | None = None
        self._need_snapshot = True
        # Not an asyncio.Queue: a consumer that is cancelled in its get (a deadline) must not lose a batch.
        self._queue: deque[WatchBatch] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"etcd-watch-{prefix}")
        self._task.add_done_callback(lambda _: self._filled.set())

    def age_s(self, now: float | None = None) -> float:
        """Seconds since etcd was last heard on this watch (`now`: `time.monotonic()`); at most about
        `progress_s` while all is well. Before the first answer: since the watch began."""
        heard_at = self._started_at if self._heard_at is None else self._heard_at
        return max(0.0, (time.monotonic() if now is None else now) - heard_at)

    async def __anext__(self) -> WatchBatch:
        while not self._queue:
            if self._task.done():
                if not self._task.cancelled():
                    self._task.result()  # a defect of ours ends the watch loudly, here
                raise StopAsyncIteration
            self._filled.clear()
            await self._filled.wait()
        self._emptied.set()
        return self._queue.popleft()

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _deliver(self, batch: WatchBatch) -> None:
        while len(self._queue) >= QUEUE_BATCHES_MAX:
            self._emptied.clear()
            await self._emptied.wait()
        self._queue.append(batch)
        self.revision = batch.revision
        self._filled.set()

    async def _run(self) -> None:
        backoff = Backoff(self._timing.backoff_first_s, self._timing.backoff_max_s)
        while True:
            heard_before = self._heard_at
            try:
                await self._once()
            except EtcdCompacted as error:
                self._endpoints.counters.watch_compactions += 1
                self._need_snapshot = True
                self._note(error)
            except EtcdError as error:
                # Refusals (rights, a full disk) too: an operator can mend them while we run.
                self._note(error)
            self.reconnects += 1
            self._endpoints.counters.watch_reconnects += 1
            if self._heard_at != heard_before:
                backoff.succeeded()
            await backoff.pause()

    def _note(self, error: EtcdError) -> None:
        if str(error) != self.last_error:  # once per cause: an outage must not fill the log
            log.warning("etcd watch %s: %s; trying again", self.prefix, error)
        self.last_error = str(error)

    async def _once(self) -> None:
        """Bring the consumer up to date, then follow one stream until it breaks. Raises EtcdError."""
        if not self._need_snapshot:
            # A linearizable read cannot be older than what we have seen, unless etcd lost its data. A store that was
            # restored from a snapshot may be further on again, but it is another cluster.
            cluster_id, revision = await self._read_place()
            self._heard_at = time.monotonic()
            if revision < self.revision or self._cluster_id not in (0, cluster_id):
                self._endpoints.counters.watch_resets += 1
                log.error("etcd's store is another one: revision %d after %d", revision, self.revision)
                self._need_snapshot = True
        if self._need_snapshot:
            snapshot = await self._read(self.prefix)
            self._heard_at = time.monotonic()
            events = tuple(WatchEvent(key, kv.mod_revision, kv) for key, kv in snapshot.items.items())
            await self._deliver(WatchBatch(snapshot.revision, events, is_snapshot=True))
            self._need_snapshot = False
            self._cluster_id = 0
            self._endpoints.counters.watch_snapshots += 1
        endpoint = self._endpoints.preferred
        try:
            await self._follow(endpoint)
        except grpc.aio.AioRpcError as error:
            self._endpoints.failed(endpoint, describe(error))
            raise EtcdUnavailable(f"{endpoint.address}: {describe(error)}") from error
        except EtcdUnavailable as error:
            self._endpoints.failed(endpoint, str(error))
            raise

    async def _follow(self, endpoint: Endpoint) -> None:
        if not await endpoint.connected(self._timing.connect_s):
            raise EtcdUnavailable(f"{endpoint.address}: not connected")
        call = endpoint.watch.Watch(metadata=HAS_LEADER)
        reading: asyncio.Future[Any] | None = None
        try:
            key, end = wire.prefix_range(self.prefix)
            create = rpc_pb2.WatchCreateRequest(key=key, range_end=end, start_revision=self.revision + 1)
            await self._write(call, rpc_pb2.WatchRequest(create_request=create))
            stream_heard_at = time.monotonic()
            while True:
                reading = reading or asyncio.ensure_future(call.read())
                done, _ = await asyncio.wait({reading}, timeout=self._timing.progress_s)
                if done:
                    response, reading = reading.result(), None
                    await self._receive(endpoint, response)
                    self._heard_at = stream_heard_at = time.monotonic()
                    continue
                silent_s = time.monotonic() - stream_heard_at
                if silent_s > self._timing.silence_s:
                    raise EtcdUnavailable(f"{endpoint.address}: silent for {silent_s:.1f} s")
                # The revision in the answer is not used: members before 3.4.25 and 3.5.8 may send it ahead
                # of events (etcd issue 15220). The answer only shows that the stream is alive.
                await self._write(call, rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()))
        finally:
            call.cancel()
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _write(self, call: Any, request: rpc_pb2.WatchRequest) -> None:
        try:
            async with asyncio.timeout(self._timing.silence_s):
                await call.write(request)
        except TimeoutError:
            raise EtcdUnavailable(f"a watch request was not taken for {self._timing.silence_s:g} s") from None
        except asyncio.InvalidStateError as error:  # grpc.aio: the stream ended before its reader noticed
            raise EtcdUnavailable("the watch stream had ended") from error

    async def _receive(self, endpoint: Endpoint, response: Any) -> None:
        if response is grpc.aio.EOF:
            raise EtcdUnavailable(f"{endpoint.address}: ended the watch")
        if response.compact_revision > 0:
            raise EtcdCompacted(
                f"revision {self.revision + 1} is compacted, {response.compact_revision} is kept"
            )
        if response.canceled:
            raise EtcdUnavailable(f"{endpoint.address}: cancelled the watch: {response.cancel_reason}")
        self._cluster_id = response.header.cluster_id
        events = wire.watch_events(response.events, self.revision)
        if events:
            await self._deliver(WatchBatch(events[-1].mod_revision, events))
