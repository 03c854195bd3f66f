"""JSON values and calls written as JSON, character by character (pure)."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum

from web.gateway.text.parsers.call_scan import CallScan, Status
from web.gateway.text.surrogates import paired

SPACE = " \t\r\n"
_OPENERS = {"{": "}", "[": "]"}
_BARE = frozenset("0123456789+-.eEtrufalsn")  # numbers, true, false, null
ARGUMENTS = ("arguments", "parameters")
CALL_KEYS = frozenset({"name", "type", "id", *ARGUMENTS})


class Scan(Enum):
    MORE = "more"
    LAST = "last"  # the value ends with this character
    BEFORE = "before"  # it has ended before this one
    BAD = "bad"


class JsonValue:
    """Finds the end of one value, which begins with the first character fed. It does not check all of the grammar:
    brackets match, and outside of strings there is only what may stand there."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._string = self._escaped = self._bare = False

    def feed(self, char: str) -> Scan:
        if self._string:
            return self._in_string(char)
        if self._bare and not self._closers and (char in SPACE or char in ",]}"):
            return Scan.BEFORE
        if char == '"':
            self._string = True
        elif char in _OPENERS:
            self._closers.append(_OPENERS[char])
        elif self._closers and char == self._closers[-1]:
            self._closers.pop()
            return Scan.MORE if self._closers else Scan.LAST
        elif char in _BARE:
            self._bare = True
        elif not (self._closers and (char in SPACE or char in ",:")):
            return Scan.BAD
        return Scan.MORE

    def _in_string(self, char: str) -> Scan:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._string = False
            return Scan.MORE if self._closers else Scan.LAST
        return Scan.MORE


class _At(Enum):
    OBJECT = "object"
    KEY = "key"
    COLON = "colon"
    VALUE = "value"
    COMMA = "comma"


class JsonCall(CallScan):
    """`{"name": NAME, "arguments": {...}}`, in any order and with other keys beside.

    `known`: names that are calls; None: all are. With `known`, an object without arguments that has keys which no call
    has is an object like any other.
    """

    def __init__(self, index: int, known: Collection[str] | None) -> None:
        super().__init__(index)
        self._known = known
        self._at = _At.OBJECT
        self._key: str | None = None
        self._value: JsonValue | None = None
        self._text = ""  # of the key or value that is under way
        self._streams = False  # it is an object of arguments, and is said while it comes
        self._name = ""
        self._waiting = ""  # arguments that came before the name
        self._complete = False  # the arguments are
        self._strange = False  # there are keys that no call has

    def _feed(self, char: str) -> Status:
        status = self._step(char)
        if status is Status.BROKEN and self._complete and self.begun:
            return Status.ENDED_BEFORE  # it has all that a call needs
        return status

    def _step(self, char: str) -> Status:
        if self._value is not None:
            return self._feed_value(self._value, char)
        if char in SPACE:
            return Status.OPEN
        match self._at, char:
            case (_At.OBJECT, "{"):
                self._at = _At.KEY
            case (_At.COLON, ":"):
                self._at = _At.VALUE
            case (_At.COMMA, ","):
                self._at = _At.KEY
            case (_At.KEY | _At.COMMA, "}"):
                return self._end()
            case (_At.VALUE, _):
                return self._begin_value(char)
            case (_At.KEY, '"'):
                return self._begin_value(char)
            case _:
                return Status.BROKEN
        return Status.OPEN

    def _begin_value(self, char: str) -> Status:
        self._value, self._text = JsonValue(), ""
        self._streams = (
            self._at is _At.VALUE and self._key in ARGUMENTS and char == "{" and not self._complete
        )
        return self._feed_value(self._value, char)

    def _feed_value(self, value: JsonValue, char: str) -> Status:
        scan = value.feed(char)
        if scan is Scan.BAD:
            return Status.BROKEN
        if scan is not Scan.BEFORE:
            if self._streams:
                self._say(char)
            else:
                self._text += char
        if scan is Scan.MORE:
            return Status.OPEN
        self._value = None
        if not self._take_value():
            return Status.BROKEN
        return self._step(char) if scan is Scan.BEFORE else Status.OPEN

    def _take_value(self) -> bool:
        """A key or a value is complete; False: that is no call."""
        if self._at is _At.KEY:
            self._at = _At.COLON
            self._key = _string(self._text)
            self._strange |= self._key not in CALL_KEYS
            return self._key is not None
        self._at = _At.COMMA
        if self._key == "name" and not self._name:
            name = _string(self._text)
            if not name or (self._known is not None and name not in self._known):
                return False
            self._name = name
            if self._waiting:
                waiting, self._waiting = self._waiting, ""
                self._say(waiting)
        elif self._key in ARGUMENTS and not self._complete:
            if not self._streams:
                self._say(_object_text(self._text))
            self._complete = True
        return True

    def _say(self, arguments: str) -> None:
        if not self._name:
            self._waiting += arguments
            return
        self._emit(self._name, arguments)

    def _end(self) -> Status:
        if not self._name or not (self._complete or self._known is None or not self._strange):
            return Status.BROKEN
        if not self._complete:
            self._say("{}")
        return Status.ENDED


class NamedCall(CallScan):
    """`NAME{...}`, as newer Mistral models write it, also with [CALL_ID]ID and [ARGS] between."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._head = ""
        self._value: JsonValue | None = None

    def _feed(self, char: str) -> Status:
        if self._value is None:
            if char != "{":
                self._head += char
                return Status.OPEN if len(self._head) <= HEAD_CHARS_MAX else Status.BROKEN
            self._value = JsonValue()
        scan = self._value.feed(char)
        if scan is Scan.BAD:
            return Status.BROKEN
        name = self._head.partition("[ARGS]")[0].partition("[CALL_ID]")[0].strip()
        if not name or any(c in SPACE for c in name):
            return Status.BROKEN
        self._emit(name, char)
        return Status.ENDED if scan is Scan.LAST else Status.OPEN


HEAD_CHARS_MAX = 256


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return paired(value) if isinstance(value, str) else None


def _object_text(text: str) -> str:
    """Arguments that are no object: none at all, or an object that was written as a string."""
    if text == "null":
        return "{}"
    inner = _string(text)
    if inner is not None and not inner.strip():
        return "{}"
    return inner if inner is not None and inner.lstrip().startswith("{") else text
