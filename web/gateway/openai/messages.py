"""Conversations: what clients send, and what a chat template gets to see of it (pure)."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from controlplane.contract.errors import RequestError
from web.gateway.openai.strict import CACHE_HINTS, PROVIDER_HINTS, Lenient, Neutrals, Strict, check_kind

END_MARK = "\ue000end of the last message\ue001"  # characters that nobody may have given a meaning

# Of a message that another server gave as an answer: empty, they say nothing.
ANSWER_FIELDS = frozenset(
    {
        "audio",
        "function_call",
        "images",
        "reasoning",
        "reasoning_content",
        "refusal",
        "thinking",
        "thinking_blocks",
        "tool_calls",
    }
)
# Of such a message, too: they stand beside what it says, or say it once more.
ANSWER_HINTS = PROVIDER_HINTS | {
    "annotations",
    "id",
    "metadata",
    "parsed",
    "phase",
    "reasoning_details",
    "status",
}
PART_HINTS = CACHE_HINTS | {"annotations", "citations", "id", "logprobs"}


PARTS = frozenset({"input_text", "output_text", "refusal", "text"})


class TextPart(Lenient):
    """`input_text` and `output_text` are the names of the responses API, which those who speak both send here, too."""

    hints = PART_HINTS

    type: Literal["text", "input_text", "output_text"]
    text: str

    @property
    def said(self) -> str:
        return self.text


class RefusalPart(Lenient):
    """What an assistant has said in place of an answer."""

    hints = PART_HINTS

    type: Literal["refusal"]
    refusal: str

    @property
    def said(self) -> str:
        return self.refusal


class CalledFunction(Lenient):
    hints = CACHE_HINTS | PROVIDER_HINTS | {"parsed_arguments"}

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] | None = None  # JSON, or what it says; none: {}


class ToolCall(Lenient):
    hints = CACHE_HINTS | PROVIDER_HINTS

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = None  # of a call that was put together from a stream


class Message(Strict):
    hints = CACHE_HINTS | ANSWER_HINTS
    neutrals: ClassVar[Neutrals] = {"is_error": (False,), "prefix": (False,), "type": ("message",)}

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart | RefusalPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Clients send back what they were given, with every field of an answer that was empty."""
        if not isinstance(data, dict):
            return data
        unknown = ANSWER_FIELDS - set(cls.model_fields)
        kept = {name: value for name, value in data.items() if value or name not in unknown}
        content = kept.get("content")
        for part in content if isinstance(content, list) else ():
            check_kind(part, PARTS, "messages", "contents")
        for other in ("reasoning", "thinking"):  # vLLM's other name for it, and that of gpt-oss
            if other in kept and not kept.get("reasoning_content"):
                kept["reasoning_content"] = kept.pop(other)
        if isinstance(kept.get("refusal"), str):  # what an assistant has said in place of an answer
            refusal = kept.pop("refusal")
            kept["content"] = content or refusal
        return kept

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.said for part in self.content)
        return self.content or ""


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


def plain(
    messages: list[Message], parts: bool, strings: bool, developers: bool = True
) -> list[dict[str, Any]]:
    """What a chat template gets to see: `parts` of text as such, or as one; and a text as a string, or as one part.
    `developers`: it knows this role; to others, which would refuse it or pass over it, it is that of the system."""

    def role(message: Message) -> str:
        return "system" if message.role == "developer" and not developers else message.role

    def content(message: Message) -> Any:
        if parts and (isinstance(message.content, list) or not strings):
            texts = [p.said for p in message.content] if isinstance(message.content, list) else [message.text]
            return [{"type": "text", "text": text} for text in texts]
        return message.text

    return [{"role": role(m), "content": content(m)} | _beside(m) for m in messages]


def mark_end(given: list[dict[str, Any]]) -> None:
    """Mark where the text of the last message ends, whatever its template puts behind it. Raises RequestError."""
    last = given[-1]
    content = last["content"]
    if isinstance(content, list) and content:
        last["content"] = [*content[:-1], content[-1] | {"text": content[-1]["text"] + END_MARK}]
    elif isinstance(content, str) and content:
        last["content"] = content + END_MARK
    else:
        raise RequestError("continue_final_message: the last message has no text to go on with")


def up_to_mark(text: str) -> str:
    """The prompt up to there. Raises RequestError."""
    before, mark, _ = text.rpartition(END_MARK)
    if not mark:
        raise RequestError("continue_final_message: the chat template does not show the last message's text")
    return before


def _beside(message: Message) -> dict[str, Any]:
    """What templates ask for with `is defined`: it is there only if the client sent it."""
    beside: dict[str, Any] = {}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            beside[name] = value
    if message.reasoning_content:
        beside["thinking"] = message.reasoning_content  # what gpt-oss' template calls it
    if message.tool_calls:
        beside["tool_calls"] = [_call(call) for call in message.tool_calls]
    return beside


def _call(call: ToolCall) -> dict[str, Any]:
    """Templates want arguments as an object, and most of them take a text for what it is."""
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        # A model wrote it so, and its client sends it back.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments) if arguments.strip() else None
    function = {"name": call.function.name, "arguments": {} if arguments is None else arguments}
    return {"id": call.id, "type": "function", "function": function}
