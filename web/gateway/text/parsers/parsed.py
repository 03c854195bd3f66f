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
        if self.calls and self.calls[-1].index == index:
            self.calls[-1].name += name
            self.calls[-1].arguments += arguments
        else:
            self.calls.append(CallDelta(index, name, arguments))

    def add(self, other: Parsed) -> None:
        """What came after."""
        self.content += other.content
        self.reasoning += other.reasoning
        for part in other.calls:
            self.call(part.index, part.name, part.arguments)
