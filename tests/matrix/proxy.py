"""Delay and loss: a relay of IP packets in user space, behind a TUN device.

What the kernel routes into the device comes out of it again, later by `delay_s`, in order; a share `loss` never comes.
These are whole packets, so TCP sees what it would see on a bad line: it sends again, backs off, and so on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import threading
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES_MAX = 65_536
HELD_MAX = 10_000  # packets; a line that is full loses what comes


class Relay:
    """Use as a context manager, entered in the namespace that gets the device."""

    def __init__(self, device: str, seed: int = 1) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self.passed = self.lost = 0
        self._device = device
        self._random = random.Random(seed)
        self._held: deque[tuple[float, bytes]] = deque()

    def __enter__(self) -> Relay:
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._over, self._over_write = os.pipe()
        try:
            fcntl.ioctl(
                self._fd, TUNSETIFF, struct.pack("16sH22x", self._device.encode(), IFF_TUN | IFF_NO_PI)
            )
            self._thread = threading.Thread(target=self._run, name="relay")
            self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        os.write(self._over_write, b".")
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._over, self._over_write):
            os.close(fd)

    def _run(self) -> None:
        while True:
            wait_s = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            ready, _, _ = select.select([self._fd, self._over], [], [], wait_s)
            if self._over in ready:
                return
            if self._fd in ready:
                self._take()
            self._give()

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(self._fd, PACKET_BYTES_MAX)
                if packet[0] >> 4 != 4:  # the kernel looks for IPv6 routers on every new device
                    continue
                if len(self._held) >= HELD_MAX or self._random.random() < self.loss:
                    self.lost += 1
                else:
                    self._held.append((time.monotonic() + self.delay_s, packet))

    def _give(self) -> None:
        now = time.monotonic()
        while self._held and self._held[0][0] <= now:
            _, packet = self._held.popleft()
            with contextlib.suppress(BlockingIOError, OSError):  # its way has gone: lost, as on any line
                os.write(self._fd, packet)
                self.passed += 1
