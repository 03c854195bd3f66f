"""The slow lane out of a node: what nobody waits for goes when nothing else does.

Activations and copies of KV leave through one network interface, and copies are most of the bytes: at 1 Gbps those of
a prompt of 160 tokens of Llama-3.1-8B take 42 ms of each stage's link, and its activations 10. When both were sent at
once the activations took twice as long, at every stage. So copies wait until all else is with the network, and go
one message at a time, which bounds what a step may find before it.
"""

from __future__ import annotations

import asyncio
from collections import deque

from controlplane.contract.ids import Member
from dataplane.core.messages import Meta

from .base import Transport
from .frames import Buffer, Send

LOOK_S = 0.001  # between two looks at whether the links are free
PATIENCE_S = 0.1  # then one message goes all the same: a full link must not leave streams without a copy
HELD_BYTES_MAX = 256 << 20


class Lane:
    """Messages leave in the order in which they came, whoever they are for. Used on the transport's loop only."""

    def __init__(self, transport: Transport, send: Send) -> None:
        self._transport = transport
        self._send = send
        self._waiting: deque[tuple[Member, Meta, Buffer]] = deque()
        self._held_bytes = 0
        self._moved_at = 0.0  # when the first one in line began to wait
        self._timer: asyncio.TimerHandle | None = None

    def send(self, peer: Member, meta: Meta, payload: Buffer) -> bool:
        """As `frames.Send`, only later. False: no link to this peer now, or too much waits. What was taken may be lost
        with the link, as with any message."""
        size = memoryview(payload).nbytes
        full = self._held_bytes > 0 and self._held_bytes + size > HELD_BYTES_MAX
        if full or not self._transport.connected(peer):
            return False
        if not self._waiting:
            self._moved_at = asyncio.get_running_loop().time()
        self._waiting.append((peer, meta, payload))
        self._held_bytes += size
        self._release()
        return True

    def close(self) -> None:
        """Drops what waits."""
        self._waiting.clear()
        self._held_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _release(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            late = loop.time() - self._moved_at >= PATIENCE_S
            if self._transport.queued_total > 0 and not late:
                break
            peer, meta, payload = self._waiting.popleft()
            self._held_bytes -= memoryview(payload).nbytes
            self._moved_at = loop.time()
            self._send(peer, meta, payload)
        if self._waiting and self._timer is None:
            self._timer = loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        self._release()
