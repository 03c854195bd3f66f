"""One tool call while its text comes (pure)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

from web.gateway.text.parsers.parsed import Parsed


class Status(Enum):
    OPEN = "open"
    ENDED = "ended"
    ENDED_BEFORE = "ended_before"  # the last character is not part of it
    BROKEN = "broken"  # with the last character


class CallScan(ABC):
    """Takes in characters until the call has ended, or is none. Until it is `begun` nothing has been said."""

    def __init__(self, index: int) -> None:
        self.begun = False
        self.status = Status.OPEN
        self._index = index
        self._new_name = ""  # to be said
        self._new_arguments: list[str] = []  # ... and what comes after it

    def feed(self, text: str, out: Parsed) -> int:
        """Returns how many characters were taken in; see `status`."""
        used = len(text)
        for at, char in enumerate(text):
            self.status = self._feed(char)
            if self.status is not Status.OPEN:
                used = at + (self.status is Status.ENDED)
                break
        if self._new_arguments:
            out.call(self._index, self._new_name, "".join(self._new_arguments))
            self._new_name, self._new_arguments = "", []
        return used

    def unsaid(self) -> str:
        """What has been taken in and not said, of a call that has begun and broke."""
        return ""

    @abstractmethod
    def _feed(self, char: str) -> Status: ...

    def _emit(self, name: str, arguments: str) -> None:
        if not self.begun:
            self.begun, self._new_name = True, name
        self._new_arguments.append(arguments)
