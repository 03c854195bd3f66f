"""All that is told apart in the output of one choice (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from web.gateway.text.parsers.families import (
    HermesParser,
    LlamaJsonParser,
    MistralParser,
    PythonicParser,
)
from web.gateway.text.parsers.parsed import Parsed
from web.gateway.text.parsers.reasoning import ReasoningMarks, ReasoningSplitter
from web.gateway.text.parsers.tool_parser import ToolParser


class ToolFormat(StrEnum):
    """How a family of models writes calls. Those of Mistral differ in what they write, and are read alike."""

    HERMES = "hermes"
    LLAMA_JSON = "llama3_json"
    PYTHONIC = "pythonic"
    MISTRAL = "mistral"  # a list of objects
    MISTRAL_NAMED = "mistral_named"  # the name, then the arguments
    MISTRAL_ARGS = "mistral_args"  # the name, [ARGS], then the arguments


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What of a model and a request decides what its text says. None: that is not told apart."""

    reasoning: ReasoningMarks | None = None
    tools: ToolFormat | None = None
    names: frozenset[str] = frozenset()  # of the request's tools
    calls_max: int | None = None
    named: bool = False  # the client named the function: its call is no reason to finish


class OutputParser:
    """`inside`: the prompt ends within the reasoning."""

    def __init__(self, rules: OutputRules, inside: bool) -> None:
        self._reasoning = ReasoningSplitter(rules.reasoning, inside) if rules.reasoning else None
        self._tools = tool_parser(rules.tools, rules.names, rules.calls_max) if rules.tools else None

    @property
    def calls(self) -> int:
        return self._tools.begun if self._tools is not None else 0

    @property
    def done(self) -> bool:
        """There are as many calls as there may be."""
        return self._tools is not None and self._tools.done

    @property
    def idle(self) -> bool:
        """All that comes is content as it stands."""
        return self._tools is None and (self._reasoning is None or self._reasoning.over)

    def push(self, text: str) -> Parsed:
        out = Parsed()
        answer = text if self._reasoning is None else self._reasoning.push(text, out)
        self._answer(answer, out)
        return out

    def finish(self) -> Parsed:
        """What was held back, when the text is over."""
        out = Parsed()
        if self._reasoning is not None:
            self._answer(self._reasoning.finish(out), out)
        if self._tools is not None:
            self._tools.finish(out)
        return out

    def _answer(self, text: str, out: Parsed) -> None:
        if self._tools is not None:
            self._tools.push(text, out)
        else:
            out.content += text


def tool_parser(kind: ToolFormat, names: frozenset[str], calls_max: int | None) -> ToolParser:
    match kind:
        case ToolFormat.HERMES:
            return HermesParser(calls_max)
        case ToolFormat.LLAMA_JSON:
            return LlamaJsonParser(names, calls_max)
        case ToolFormat.PYTHONIC:
            return PythonicParser(names, calls_max)
        case ToolFormat.MISTRAL | ToolFormat.MISTRAL_NAMED | ToolFormat.MISTRAL_ARGS:
            return MistralParser(calls_max)
