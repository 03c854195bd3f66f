"""A call written as Python, character by character: `NAME(key=literal, ...)` (pure)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum

from web.gateway.text.parsers.call_scan import CallScan, Status
from web.gateway.text.parsers.python_literal import NotLiteral, to_json

NAME_CHARS_MAX = 128
_NAME = re.compile(r"[A-Za-z_][\w.\-]*", re.ASCII)
_CLOSERS = {"(": ")", "[": "]", "{": "}"}


class _At(Enum):
    NAME = "name"
    KEY = "key"
    VALUE = "value"


class PythonCall(CallScan):
    """The arguments are said one by one, each when it is complete; `known`: names that are calls."""

    def __init__(self, index: int, known: Collection[str] | None) -> None:
        super().__init__(index)
        self._known = known
        self._at = _At.NAME
        self._text = ""  # of the name, key or value that is under way
        self._name = self._key = ""
        self._count = 0  # arguments so far
        self._closers: list[str] = []  # within a value
        self._quote = ""
        self._escaped = False

    def _feed(self, char: str) -> Status:
        match self._at:
            case _At.NAME:
                return self._feed_name(char)
            case _At.KEY:
                return self._feed_key(char)
            case _At.VALUE:
                return self._feed_value(char)

    def _feed_name(self, char: str) -> Status:
        if char != "(":
            self._text += char
            fits = len(self._text) <= NAME_CHARS_MAX and (
                not self._text.strip() or _NAME.fullmatch(self._text.strip())
            )
            return Status.OPEN if fits else Status.BROKEN
        self._name, self._text = self._text.strip(), ""
        if not self._name or (self._known is not None and self._name not in self._known):
            return Status.BROKEN
        self._emit(self._name, "{")
        self._at = _At.KEY
        return Status.OPEN

    def _feed_key(self, char: str) -> Status:
        if char == ")" and not self._text.strip():
            self._emit(self._name, "}")
            return Status.ENDED
        if char != "=":
            text = self._text + char
            if len(text) > NAME_CHARS_MAX or (text.strip() and not _NAME.fullmatch(text.strip())):
                return Status.BROKEN
            self._text = text
            return Status.OPEN
        self._key, self._text = self._text.strip(), ""
        self._at = _At.VALUE
        return Status.OPEN if self._key else Status.BROKEN

    def _feed_value(self, char: str) -> Status:
        if not (self._quote or self._closers) and char in ",)":
            return self._end_value(char)
        if not self._quote and char in ")]}" and (not self._closers or self._closers.pop() != char):
            return Status.BROKEN
        self._text += char
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "'\"":
            self._quote = char
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        return Status.OPEN

    def _end_value(self, char: str) -> Status:
        try:
            value = to_json(self._text)
        except NotLiteral:
            return Status.BROKEN
        comma = ", " if self._count else ""
        self._emit(self._name, f"{comma}{json.dumps(self._key, ensure_ascii=False)}: {value}")
        self._count += 1
        self._text = ""
        self._at = _At.KEY
        if char == ",":
            return Status.OPEN
        self._emit(self._name, "}")
        return Status.ENDED

    def unsaid(self) -> str:
        return f"{self._key}={self._text}" if self._at is _At.VALUE else self._text
