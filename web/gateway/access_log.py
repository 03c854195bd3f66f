"""The access log: one JSON line for each request that has ended, in a file of its own, rotated. Off unless asked for.

A thread writes, so that no stream waits for a disk. Lines for which there is no room, or which the disk does not take,
are counted and lost: requests are served in any case.
"""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path

import msgspec
import structlog

from controlplane.contract.errors import ConfigError
from controlplane.contract.lives import Life

log = structlog.get_logger()

FILE_BYTES_MAX = 64 << 20
FILES_MAX = 5  # NAME.access.log, and .1 (the newest) to .4 beside it
WAITING_MAX = 10_000  # lines
CLOSE_LIMIT_S = 2.0


class AccessLog:
    """`written` and `dropped` count lines. Belongs to one event loop, but for its thread."""

    def __init__(
        self, folder: Path, name: str, bytes_max: int = FILE_BYTES_MAX, files_max: int = FILES_MAX
    ) -> None:
        """Raises ConfigError where nothing can be written there."""
        self.path = folder / f"{name}.access.log"
        self.written = 0
        self.dropped = 0
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING_MAX)
        self._trouble = ""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = self._open()
        except OSError as error:
            raise ConfigError(
                f"gateway.access_log_dir: cannot write {self.path}: {error.strerror}"
            ) from error
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def put(self, life: Life) -> None:
        """Write it soon."""
        try:
            self._waiting.put_nowait(line(life))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, within `CLOSE_LIMIT_S`."""
        try:
            self._waiting.put(None, timeout=CLOSE_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        while (text := self._waiting.get()) is not None:
            try:
                self._write(text)
            except OSError as error:
                self.dropped += 1
                if error.strerror != self._trouble:
                    log.warning("the access log cannot be written", path=str(self.path), error=error.strerror)
                self._trouble = error.strerror or ""
            else:
                self.written += 1
                self._trouble = ""
        os.close(self._fd)

    def _write(self, text: bytes) -> None:
        size = os.fstat(self._fd).st_size
        if size and size + len(text) > self._bytes_max:
            self._rotate()
        done = os.write(self._fd, text)
        if done < len(text):  # a full disk takes a part: half a line would spoil the next one as well
            os.ftruncate(self._fd, max(0, os.fstat(self._fd).st_size - done))
            raise OSError(28, "the disk is full")

    def _rotate(self) -> None:
        for number in range(self._files_max - 2, -1, -1):
            older = self.path.with_name(f"{self.path.name}.{number}") if number else self.path
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number + 1}"))
        fresh = self._open()
        os.close(self._fd)
        self._fd = fresh

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def line(life: Life) -> bytes:
    """One request, without what would make a line long: places and pauses are counted, `kfadmin describe request` has
    them."""
    fields = msgspec.to_builtins(life)
    places, pauses = fields.pop("places"), fields.pop("pauses")
    fields |= {
        "pipelines": list(dict.fromkeys(place["pipeline"] for place in places)),
        "epochs": list(dict.fromkeys([*(p["epoch"] for p in places), *(p["epoch"] for p in pauses)])),
        "pauses": len(pauses),
    }
    return msgspec.json.encode(fields) + b"\n"
