"""What a parser makes of a piece of text (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CallDelta:
    """A part of tool call `index`: its name in the first one, and the next characters of its arguments (JSON)."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Parsed:
    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)  # at most one for each call

    def call(self, index: int, name: str = "", arguments: str = "") -> None:
        """Call `index` goes on."""
        add_call(self.calls, CallDelta(index, name, arguments))

    def add(self, other: Parsed) -> None:
        """What came after."""
        self.content += other.content
        self.reasoning += other.reasoning
        for part in other.calls:
            add_call(self.calls, part)


def add_call(calls: list[CallDelta], part: CallDelta) -> None:
    """`part` comes after `calls`, which keep one entry for each call."""
    if calls and calls[-1].index == part.index:
        calls[-1].name += part.name
        calls[-1].arguments += part.arguments
    else:
        calls.append(CallDelta(part.index, part.name, part.arguments))
