"""How a model writes calls and reasoning, by its chat template (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from web.gateway.text.parsers.output import ToolFormat
from web.gateway.text.parsers.reasoning import MISTRAL_THINK, THINK, ReasoningMarks

AUTO, NONE = "auto", "none"
REASONING: Mapping[str, ReasoningMarks] = {"think": THINK, "mistral": MISTRAL_THINK}
# What the formats' marks are, where the tokenizer has special tokens of these names.
MARKS: Mapping[ToolFormat, tuple[str, ...]] = {
    ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA_JSON: ("<|python_tag|>",),
    ToolFormat.PYTHONIC: ("<|python_start|>", "<|python_end|>"),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ToolFormat.MISTRAL_NAMED: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ToolFormat.MISTRAL_ARGS: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}
_MISTRAL_LIST = re.compile(r"\[TOOL_CALLS\] ?\[")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    tools: ToolFormat | None = None
    reasoning: ReasoningMarks | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """All that tells parts of the output apart."""
        reasoning = (self.reasoning.begin, self.reasoning.end) if self.reasoning else ()
        return (*(MARKS[self.tools] if self.tools else ()), *reasoning)


def output_format(source: str, tools: str = AUTO, reasoning: str = AUTO) -> OutputFormat:
    """Of a chat template's `source`, unless the settings name one: a ToolFormat, a key of REASONING, or none."""
    chosen = _tools_of(source) if tools == AUTO else None if tools == NONE else ToolFormat(tools)
    marks = _reasoning_of(source) if reasoning == AUTO else REASONING.get(reasoning)
    return OutputFormat(chosen, marks)


def _tools_of(source: str) -> ToolFormat | None:
    if "[TOOL_CALLS]" in source:
        if "[ARGS]" in source:
            return ToolFormat.MISTRAL_ARGS
        return ToolFormat.MISTRAL if _MISTRAL_LIST.search(source) else ToolFormat.MISTRAL_NAMED
    if "<tool_call>" in source:
        # Qwen3-Coder and GLM write XML within the same marks, which is no format of ours.
        return None if "<function=" in source or "<arg_key>" in source else ToolFormat.HERMES
    if "[func_name1(" in source:
        return ToolFormat.PYTHONIC
    if '"parameters": dictionary' in source or "<|python_tag|>" in source:
        return ToolFormat.LLAMA_JSON
    return None


def _reasoning_of(source: str) -> ReasoningMarks | None:
    """Of one that opens the reasoning in the prompt and leaves it in conversations, the first mark is all there is."""
    return next(
        (marks for marks in (THINK, MISTRAL_THINK) if marks.begin in source or marks.end in source), None
    )
