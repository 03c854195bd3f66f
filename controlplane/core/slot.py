"""One value in etcd as its writer sees it: what is known, and what is on its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

REREAD_AGAIN_S = 2.0  # etcd may be away, and a read takes a second to fail: do not ask faster than that


@dataclass(slots=True)
class Slot(Generic[T]):
    """At most one write at a time. After a conflict or an unknown outcome nothing is written before a fresh read."""

    value: T | None = None
    mod_revision: int = 0
    pending: T | None = None
    asked_at: float | None = None  # a read is wanted since then
    # What is there cannot be read: `value` is the last good one, and nothing is written.
    unknown: bool = False

    @property
    def busy(self) -> bool:
        return self.pending is not None or self.asked_at is not None or self.unknown

    def seen(self, value: T | None, mod_revision: int, read: bool = False) -> bool:
        """A watch or a read brought this. False: it is older than what is known.

        A read that is awaited is believed whatever it brings: etcd may have been restored from a backup. A watch is
        not: it may only lag, and what it brings late does not end the wait.
        """
        awaited = read and self.asked_at is not None
        if not awaited and value is not None and mod_revision <= self.mod_revision:
            return False
        self.asked_at = None
        self.unknown = False
        self.value = value
        self.mod_revision = 0 if value is None else mod_revision
        return True

    def unreadable(self) -> None:
        """A watch or a read brought something that cannot be read."""
        self.asked_at = None
        self.unknown = True

    def done(self, value: T, mod_revision: int) -> bool:
        """The write of `value` took effect; whether it is news.

        It is none when a watch was faster, nor when the write was forgotten: then the watch tells, in its time.
        """
        if self.pending is not value:
            return False
        self.pending = None
        if mod_revision <= self.mod_revision:
            return False
        self.value, self.mod_revision = value, mod_revision
        return True

    def failed(self, value: T, now: float) -> bool:
        """The write of `value` took no effect, or nobody knows; whether a read is wanted now."""
        if self.pending is not value:
            return False
        self.pending = None
        self.asked_at = now
        return True

    def ask_again(self, now: float) -> bool:
        """Whether it is time to repeat the read."""
        if self.asked_at is None or now - self.asked_at < REREAD_AGAIN_S:
            return False
        self.asked_at = now
        return True

    def forget_writes(self) -> None:
        """Leadership is lost: no answer is waited for, and one that comes all the same is not taken for another's."""
        self.pending = None
        self.asked_at = None
