"""Content and tool calls in a text, for each way in which models write them (pure)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection

from web.gateway.text.held_back import possible_start
from web.gateway.text.parsers.json_scan import SPACE, JsonCall, NamedCall
from web.gateway.text.parsers.parsed import Parsed
from web.gateway.text.parsers.python_scan import PythonCall
from web.gateway.text.parsers.tool_parser import ToolParser

FENCE = "```"
_SPACE = f"[{SPACE}]{{0,64}}"
_OPENING = re.compile(
    rf"{_SPACE}`{{1,2}}\Z|{_SPACE}(?P<fence>{FENCE}\w{{0,32}}{_SPACE})?(?P<list>\[{_SPACE})?"
)


class _Marked(ToolParser):
    """Calls stand behind marks, anywhere in the text."""

    mark = ""

    def _first_state(self, out: Parsed) -> bool:
        return self._content(out)

    def _content(self, out: Parsed) -> bool:
        said, mark, rest = self._buffer.partition(self.mark)
        if not mark:
            kept = len(said) - possible_start(said, (self.mark,))
            self._say(said[:kept], out)
            self._buffer = said[kept:]
            return False
        self._say(said, out)
        self._buffer = rest
        self._behind_mark()
        return True

    @abstractmethod
    def _behind_mark(self) -> None: ...

    def _no_call(self) -> Callable[[Parsed], bool]:
        return self._not_this_mark

    def _not_this_mark(self, out: Parsed) -> bool:
        """The buffer begins with a mark that is plain text; others may follow."""
        at = len(self.mark) if self._buffer.startswith(self.mark) else 1
        self._say(self._buffer[:at], out)
        self._buffer = self._buffer[at:]
        self._state = self._content
        return True


def _separated(text: str) -> tuple[str, str]:
    """White space and a separator, with which another call may follow; and the rest."""
    rest = text.lstrip()
    if rest[:1] in (";", ","):
        rest = rest[1:].lstrip()
    return text[: len(text) - len(rest)], rest


class HermesParser(_Marked):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3.

    Models also write several objects within the marks, or a list of them, with a fence of Markdown around, or with one
    closing brace too many.
    """

    mark = "<tool_call>"
    end = "</tool_call>"
    ends = (end,)

    def __init__(self, calls_max: int | None = None) -> None:
        super().__init__(calls_max)
        # What may stand between the last call and the end mark, in this order.
        self._closers: tuple[str, ...] = ()

    def _behind_mark(self) -> None:
        self._head = self.mark
        self._state = self._first_call

    def _first_call(self, out: Parsed) -> bool:
        opening = _OPENING.match(self._buffer)
        assert opening is not None
        if opening.end() == len(self._buffer):
            return False  # more of it may come
        self._buffer = self._buffer[opening.end() :]
        closers = {"}": True, "]": opening["list"], FENCE: opening["fence"], self.end: True}
        self._closers = tuple(closer for closer, needed in closers.items() if needed)
        self._begin_call(JsonCall(self.begun, None), self._head + opening[0])
        return True

    def _call_ended(self) -> Callable[[Parsed], bool]:
        return self._after_object

    def _after_object(self, out: Parsed) -> bool:
        head, text = _separated(self._buffer)
        if text[:1] == "{":
            self._buffer = text
            self._begin_call(JsonCall(self.begun, None), head)
            return True
        end = self._end_of_mark()
        self._closing = end is None
        if end is None or not text:
            return False
        self._buffer = self._buffer[end:]
        self._state = self._content
        return True

    def _end_of_mark(self) -> int | None:
        """How much of the buffer is the end; None: all of it may become that."""
        at, text = 0, self._buffer
        for closer in self._closers:
            while text[at : at + 1].isspace():
                at += 1
            if text.startswith(closer, at):
                at += len(closer)
            elif closer.startswith(text[at:]):
                return None
            elif closer == self.end:
                return 0
        return at

    def finish(self, out: Parsed) -> None:
        if self._state == self._first_call:
            self._buffer = self._head + self._buffer
        super().finish(out)


class MistralParser(_Marked):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, `[TOOL_CALLS]NAME{...}` for each call, or objects behind
    the mark without the brackets of a list."""

    mark = "[TOOL_CALLS]"
    ends = (mark,)

    def __init__(self, calls_max: int | None = None) -> None:
        super().__init__(calls_max)
        self._after: Callable[[Parsed], bool] = self._content  # a call behind this mark

    def _behind_mark(self) -> None:
        self._head = self.mark
        self._state = self._first_call

    def _first_call(self, out: Parsed) -> bool:
        self._head += self._take_space()
        match self._buffer[:1]:
            case "":
                return False
            case "[":
                self._buffer = self._buffer[1:]
                self._after = self._after_item
                self._begin_call(JsonCall(self.begun, None), self._head + "[")
            case "{":
                self._after = self._after_object
                self._begin_call(JsonCall(self.begun, None), self._head)
            case _:
                self._after = self._content
                self._begin_call(NamedCall(self.begun), self._head)
        return True

    def _call_ended(self) -> Callable[[Parsed], bool]:
        return self._after

    def _after_item(self, out: Parsed) -> bool:
        return self._next_item(lambda: JsonCall(self.begun, None), self._content)

    def _after_object(self, out: Parsed) -> bool:
        head, text = _separated(self._buffer)
        if not text:
            return False
        self._state = self._content
        if text[0] == "{":
            self._buffer = text
            self._begin_call(JsonCall(self.begun, None), head)
        return True

    def finish(self, out: Parsed) -> None:
        if self._state == self._first_call:
            self._buffer = self._head + self._buffer
        super().finish(out)


class LlamaJsonParser(ToolParser):
    """`{"name": ..., "parameters": {...}}`, several of them with `;` between, or a list: Llama 3.1 and later.

    They begin a line, or stand behind a mark. No mark is needed, so the names tell them from other objects; those in a
    fence of Markdown are examples.
    """

    mark = "<|python_tag|>"
    closers = ("<|eom_id|>", "<|eot_id|>")
    ends = closers

    def __init__(self, known: Collection[str], calls_max: int | None = None) -> None:
        super().__init__(calls_max)
        self._known = frozenset(known)
        self._fenced = self._list = False

    def _first_state(self, out: Parsed) -> bool:
        return self._line_start(out)

    def _line_start(self, out: Parsed) -> bool:
        self._say(self._take_space(), out)
        if self._buffer != FENCE and FENCE.startswith(self._buffer):
            return False  # or there is nothing yet
        if self._buffer.startswith(FENCE):
            self._fenced = not self._fenced
        elif not self._fenced and self._buffer[0] in "{[":
            self._first_object()
            return True
        self._state = self._within_line
        return True

    def _within_line(self, out: Parsed) -> bool:
        end = self._buffer.find("\n") + 1 or len(self._buffer)
        at = self._buffer.find(self.mark, 0, end)
        if at >= 0:
            self._state, end = self._behind_mark, at
        elif self._buffer[end - 1] == "\n":
            self._state = self._line_start
        else:
            end -= possible_start(self._buffer, (self.mark,))
        self._say(self._buffer[:end], out)
        self._buffer = self._buffer[end:]
        return self._state != self._within_line

    def _behind_mark(self, out: Parsed) -> bool:
        before, mark, rest = self._buffer.partition(self.mark)
        text = rest.lstrip()
        if not text:
            return False
        if text[0] in "{[":
            self._first_object()
            return True
        self._say(before + mark, out)
        self._buffer = rest
        self._state = self._within_line
        return True

    def _first_object(self) -> None:
        """The first bracket in the buffer may begin it, or a list."""
        at = min(at for bracket in "{[" if (at := self._buffer.find(bracket)) >= 0)
        self._list = self._buffer[at] == "["
        at += self._list
        head, self._buffer = self._buffer[:at], self._buffer[at:]
        self._begin_call(JsonCall(self.begun, self._known), head)

    def _call_ended(self) -> Callable[[Parsed], bool]:
        return self._after_item if self._list else self._between

    def _after_item(self, out: Parsed) -> bool:
        return self._next_item(lambda: JsonCall(self.begun, self._known), self._between)

    def _between(self, out: Parsed) -> bool:
        _, text = _separated(self._buffer)
        self._closing = not text
        if any(mark != text and mark.startswith(text) for mark in (self.mark, *self.closers)):
            return False  # or there is no text yet
        for closer in self.closers:
            if text.startswith(closer):
                self._buffer = text[len(closer) :]
                return True
        if text.startswith(self.mark):
            self._state = self._behind_mark
        elif text[0] in "{[":
            self._first_object()
        else:
            self._state = self._within_line
        return True

    def _no_call(self) -> Callable[[Parsed], bool]:
        return self._within_line

    def _give_up(self, out: Parsed) -> None:
        """What it took in is not read again, lest objects in one another are read once for each."""
        head, self._head, self._call = self._head, "", None
        self._say(head, out)
        _, line_end, line = head.rpartition("\n")
        self._state = self._line_start if line_end and not line.strip() else self._no_call()


class PythonicParser(ToolParser):
    """`[NAME(key=literal, ...), ...]`: Llama 3.2 and 4. The output is calls from its beginning on, or has none: the
    names tell."""

    opener = "<|python_start|>"
    closer = "<|python_end|>"

    def __init__(self, known: Collection[str], calls_max: int | None = None) -> None:
        super().__init__(calls_max)
        self._known = frozenset(known)

    def _first_state(self, out: Parsed) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(self.opener):
            text = text[len(self.opener) :].lstrip()
        elif self.opener.startswith(text):
            return False
        if not text:
            return False
        if text[0] != "[":
            self._state = self._plain
            return True
        head = self._buffer[: len(self._buffer) - len(text)]
        self._buffer = text[1:]
        self._begin_call(PythonCall(self.begun, self._known), head + "[")
        return True

    def _no_call(self) -> Callable[[Parsed], bool]:
        return self._plain

    def _call_ended(self) -> Callable[[Parsed], bool]:
        return self._between

    def _between(self, out: Parsed) -> bool:
        return self._next_item(lambda: PythonCall(self.begun, self._known), self._end_mark)

    def _end_mark(self, out: Parsed) -> bool:
        self._take_space()
        if self._buffer.startswith(self.closer):
            self._buffer = self._buffer[len(self.closer) :]
        elif self.closer.startswith(self._buffer):
            self._closing = True
            return False
        self._closing = False
        self._state = self._plain
        return True
