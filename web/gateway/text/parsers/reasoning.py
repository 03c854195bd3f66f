"""Reasoning, which stands between two marks before the answer (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from web.gateway.text.held_back import possible_start
from web.gateway.text.parsers.parsed import Parsed


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    begin: str
    end: str


THINK = ReasoningMarks("<think>", "</think>")
MISTRAL_THINK = ReasoningMarks("[THINK]", "[/THINK]")


class ReasoningMeter:
    """Whether a text is within the reasoning, piece by piece: what ReasoningSplitter says, at less cost."""

    def __init__(self, marks: ReasoningMarks, inside: bool) -> None:
        self._marks = marks
        self.inside = inside
        self.over = False
        self._tail = ""  # the beginning, before it is known; then what may be the beginning of the end mark

    def push(self, text: str) -> bool:
        """Whether `text`, or a part of it, belongs to the reasoning."""
        if self.over:
            return False
        begun = self.inside
        text, begin, end = self._tail + text, self._marks.begin, self._marks.end
        if not begun:
            bare = text.lstrip()
            if not bare.startswith(begin):
                self._tail, self.over = text, not begin.startswith(bare)
                return False
            self.inside, text = True, bare[len(begin) :]
        self._tail = text[-len(end) + 1 :]
        if end in text:
            self.inside, self.over = False, True
        return begun or self.inside


class _At(Enum):
    START = "start"  # nothing but white space, or the beginning of the first mark
    INSIDE = "inside"
    AFTER = "after"  # the end mark; white space may follow
    ANSWER = "answer"


class ReasoningSplitter:
    """`inside`: the prompt ends with the first mark, as templates of models that always reason have it.

    White space next to the marks belongs to neither side. Marks in the answer itself are plain text.
    """

    def __init__(self, marks: ReasoningMarks, inside: bool) -> None:
        self._marks = marks
        self._at = _At.INSIDE if inside else _At.START
        self._held = ""
        self._begun = False  # some reasoning was said

    @property
    def inside(self) -> bool:
        return self._at is _At.INSIDE

    @property
    def over(self) -> bool:
        """All that comes is the answer's."""
        return self._at is _At.ANSWER

    def push(self, text: str, out: Parsed) -> str:
        """Say the reasoning in `text` to `out`; returns what is part of the answer."""
        if self._at is _At.ANSWER:
            return text
        text, self._held = self._held + text, ""
        if self._at is _At.START:
            bare = text.lstrip()
            if not bare.startswith(self._marks.begin):
                if self._marks.begin.startswith(bare):
                    self._held = text
                    return ""
                self._at = _At.ANSWER
                return text
            self._at = _At.INSIDE
            text = bare[len(self._marks.begin) :]
        if self._at is _At.INSIDE:
            said, mark, rest = text.partition(self._marks.end)
            if not mark:
                kept = said[: len(said) - possible_start(said, (self._marks.end,))].rstrip()
                self._held = said[len(kept) :]
                self._say(kept, out)
                return ""
            self._say(said.rstrip(), out)
            self._at = _At.AFTER
            text = rest
        text = text.lstrip()
        if text:
            self._at = _At.ANSWER
        return text

    def finish(self, out: Parsed) -> str:
        """The text is over: what was held back is what it looks like."""
        held, self._held = self._held, ""
        if self._at is _At.INSIDE:
            self._say(held, out)
            return ""
        return held

    def _say(self, text: str, out: Parsed) -> None:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        out.reasoning += text
