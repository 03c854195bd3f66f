"""What a client has of an answer in the end, however it was cut into events and whichever gateways sent it."""

from __future__ import annotations

import json
from typing import Any

# They differ from one time of asking to the next.
NAMES = frozenset({"id", "item_id", "call_id", "created", "created_at", "completed_at"})


class Outcome:
    """`answer`: choices (or a response) and usage, without names and times."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.done = False
        self.error = ""
        self.last_id = ""
        self.tokens = 0  # events or, of an answer in one piece, 1
        self._choices: dict[int, Any] = {}
        self._usage: Any = None
        self._response: Any = None
        self._number = -1
        self._said: dict[str, str] = {}  # by item, of a response

    def whole(self, body: Any) -> None:
        self.answer, self.done, self.tokens = unnamed(body), True, 1

    def event(self, text: str) -> None:
        fields = [line.partition(": ")[::2] for line in text.splitlines() if not line.startswith(":")]
        given = dict(fields)
        self.last_id = given.get("id", self.last_id)
        kind, data = given.get("event", ""), given.get("data", "")
        if kind == "reconnect" or not data:
            return
        if data == "[DONE]":
            self._end()
            return
        value = json.loads(data)
        if value.get("error"):
            raise AssertionError(f"an error in a stream: {value['error']}")
        self.tokens += 1
        if "type" in value:
            self._of_response(value)
            return
        self._usage = value.get("usage") or self._usage
        for choice in value["choices"]:
            self._choices[choice["index"]] = merged(self._choices.get(choice["index"]), choice)

    def _of_response(self, value: dict[str, Any]) -> None:
        """Who comes back between two events of one message has the first again, with its number."""
        if value["sequence_number"] <= self._number:
            return
        self._number = value["sequence_number"]
        if value["type"].endswith(".delta"):
            place = f"{value['output_index']}.{value.get('content_index', '')}"
            self._said[place] = self._said.get(place, "") + value["delta"]
        self._response = value.get("response", self._response)

    def _end(self) -> None:
        self.done = True
        if self._response is not None:
            self.answer = unnamed({"response": self._response, "said": self._said})
        else:
            self.answer = unnamed({"choices": self._choices, "usage": self._usage})


def merged(old: Any, new: Any) -> Any:
    """Deltas put together: texts and lists grow, calls by their index."""
    match old, new:
        case (None, _):
            return _by_index(new)
        case (_, None):
            return old
        case str(), str():
            return old + new
        case dict(), list():
            for item in new:
                old[item["index"]] = merged(old.get(item["index"]), item)
            return old
        case list(), list():
            return old + new
        case dict(), dict():
            return old | {key: merged(old.get(key), value) for key, value in new.items()}
    return new


def _by_index(value: Any) -> Any:
    """A list of parts that have an index, by it; of all else the same."""
    match value:
        case [{"index": _}, *_]:
            return merged({}, value)
        case dict():
            return {key: _by_index(inner) for key, inner in value.items()}
    return value


def unnamed(value: Any) -> Any:
    match value:
        case dict():
            return {key: "" if key in NAMES and inner else unnamed(inner) for key, inner in value.items()}
        case list():
            return [unnamed(inner) for inner in value]
    return value
