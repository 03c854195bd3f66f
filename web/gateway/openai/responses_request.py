"""POST /v1/responses: its body, and the chat that it asks for (pure).

A response is a chat that is written down in another way. Nothing is stored, so what refers to something that is has no
meaning here, and is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from web.gateway.errors import ApiError, shorten
from web.gateway.openai.messages import PART_HINTS, Message
from web.gateway.openai.requests import INT64_MAX, LOGPROBS_MAX, ChatRequest, Effort, EventOptions, Request
from web.gateway.openai.strict import CACHE_HINTS, Lenient, Strict, check_kind
from web.gateway.openai.structured import JsonSchemaFormat, ResponseFormat, Schema
from web.gateway.openai.tools import (
    TOOLS_MAX,
    AllowedChoice,
    AllowedFunctions,
    Function,
    Name,
    NamedChoice,
    NamedFunction,
    OfFunction,
    Tool,
)

LOGPROBS = "message.output_text.logprobs"
INCLUDED = frozenset({LOGPROBS, "reasoning.encrypted_content"})  # of the latter there is none
INCLUDE_MAX = 16
PARTS = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"})
METADATA_MAX = 16  # OpenAI's bounds: the answer tells it again
STORED = (
    "previous_response_id",
    "conversation",
    "prompt",
)  # what a server that stores something would look up
# The chat's names for what has another one here.
NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
}


MetadataName = Annotated[str, Field(max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class TextFormat(Lenient):
    """As OpenAI's response_format, in one object."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: str | None = None  # no model that is served here was taught what it says


class Reasoning(Strict):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # reasoning is shown as it is
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None  # what of the input's reasoning counts: the chat template knows
    mode: Literal["standard"] | None = None


class FunctionTool(OfFunction):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Strict):
    type: Literal["function"]
    name: Name


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=TOOLS_MAX, fail_fast=True)]


class Part(Lenient):
    hints = PART_HINTS

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"]  # PARTS
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @property
    def said(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


Parts = Annotated[list[Part], Field(fail_fast=True)]


class Item(Lenient):
    """One of a conversation: a message, a call, its result, or reasoning. Which fields it needs depends on its type."""

    hints = CACHE_HINTS | {"created_by", "metadata"}

    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    content: str | Parts | None = None
    phase: str | None = None
    call_id: Annotated[str, Field(max_length=256)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    arguments: str | None = None
    output: str | Parts | None = None
    summary: Parts | None = None
    encrypted_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_parts(cls, data: Any) -> Any:
        for name in ("content", "output") if isinstance(data, dict) else ():
            parts = data.get(name)
            for part in parts if isinstance(parts, list) else ():
                check_kind(part, PARTS, "input", "contents")
        return data

    @property
    def text(self) -> str:
        given = self.output if self.type == "function_call_output" else self.content
        return given if isinstance(given, str) else "".join(part.said for part in given or ())


class ResponsesRequest(Request):
    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: EventOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    # Of tools that a server runs: here it runs none.
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[str], Field(max_length=INCLUDE_MAX)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[MetadataName, MetadataText], Field(max_length=METADATA_MAX)] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    # Beyond OpenAI's, as in the chat API.
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    choices: ClassVar[int] = 1
    return_token_ids: ClassVar[None] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in STORED:
            if getattr(self, name) is not None:
                text = f"{name} is not supported: this server stores no responses; send the whole input"
                raise ApiError(400, text, name)
        if self.store:
            text = (
                "store: true is not supported: this server stores no responses; leave it out, or send false"
            )
            raise ApiError(400, text, "store")
        if self.background:
            raise ApiError(
                400, "background is not supported: nothing is stored that could be asked for", "background"
            )
        if self.truncation == "auto":
            raise ApiError(400, "truncation: auto is not supported: the input is never cut", "truncation")
        if unknown := set(self.include or ()) - INCLUDED:
            raise ApiError(400, f"include: {shorten(min(unknown))} is not supported", "include")
        return self

    @property
    def logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())


def chat_of(request: ResponsesRequest) -> ChatRequest:
    """The chat that is asked for. Raises ApiError naming the parameter as it is called here."""
    fields: dict[str, Any] = {
        "messages": messages_of(request),
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": True if request.logprobs else None,
        "response_format": _format(request.text),
        "reasoning_effort": request.reasoning.effort if request.reasoning is not None else None,
        "tools": [_tool(tool) for tool in request.tools] if request.tools is not None else None,
        "tool_choice": _choice(request.tool_choice),
    }
    same = (
        *(
            "model",
            "stream",
            "temperature",
            "top_p",
            "top_logprobs",
            "parallel_tool_calls",
            "seed",
            "top_k",
            "min_p",
        ),
        *(
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "enable_thinking",
            "chat_template_kwargs",
            "cache_salt",
            "priority",
            "request_id",
        ),
    )
    fields |= {name: getattr(request, name) for name in same}
    return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})


def renamed(error: ApiError) -> ApiError:
    """An error of the chat, in the words of this API."""
    if error.param not in NAMES:
        return error
    name = NAMES[error.param]
    text = error.message.replace(error.param, name)
    return type(error)(error.status, text, name, error.retry_after_s)


def messages_of(request: ResponsesRequest) -> list[Message]:
    """Calls belong to the message before, or make one; instructions go before all, with what stands there already."""
    said: list[dict[str, Any]] = []
    items = [Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    thought = ""
    for item in items:
        match item.type:
            case "message":
                role = "system" if item.role == "developer" else _needed(item, "role")
                if item.content is None:
                    raise ApiError(400, "input: a message needs content", "input")
                said.append({"role": role, "content": item.text})
            case "function_call":
                if not (said and said[-1]["role"] == "assistant" and not thought):
                    said.append({"role": "assistant", "content": None})
                function = {"name": _needed(item, "name"), "arguments": _needed(item, "arguments")}
                call = {"id": _needed(item, "call_id"), "type": "function", "function": function}
                said[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                said.append({"role": "tool", "content": item.text, "tool_call_id": _needed(item, "call_id")})
            case "reasoning":
                thought = item.text or "".join(part.said for part in item.summary or ())
                continue
            case "item_reference":
                text = (
                    "input: item_reference names what a server has stored, and this one stores nothing: send the item"
                    " itself (clients that are told store: false do so)"
                )
                raise ApiError(400, text, "input")
            case _:
                text = f"input: items of the type {shorten(item.type)} are not supported"
                raise ApiError(400, text, "input")
        if thought and said[-1]["role"] == "assistant":
            said[-1]["reasoning_content"] = thought
        thought = ""
    if request.instructions:
        if said and said[0]["role"] == "system":
            said[0]["content"] = f"{request.instructions}\n\n{said[0]['content']}"
        else:
            said.insert(0, {"role": "system", "content": request.instructions})
    if not said:
        raise ApiError(400, "input has no message", "input")
    return [Message.model_validate(message) for message in said]


def _needed(item: Item, name: str) -> str:
    value = getattr(item, name)
    if value is None:
        raise ApiError(400, f"input: an item of the type {shorten(item.type)} needs {name}", "input")
    return str(value)


def _tool(tool: FunctionTool) -> Tool:
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: str | NamedTool | AllowedTools | None) -> str | NamedChoice | AllowedChoice | None:
    match choice:
        case NamedTool():
            return NamedChoice(type="function", function=NamedFunction(name=choice.name))
        case AllowedTools():
            names = [
                NamedChoice(type="function", function=NamedFunction(name=one.name)) for one in choice.tools
            ]
            return AllowedChoice(
                type="allowed_tools", allowed_tools=AllowedFunctions(mode=choice.mode, tools=names)
            )
        case _:
            return choice


def _format(text: TextConfig | None) -> ResponseFormat | None:
    given = text.format if text is not None else None
    if given is None:
        return None
    if given.type != "json_schema":
        return ResponseFormat(type=given.type)
    schema = JsonSchemaFormat(
        name=given.name, description=given.description, schema=given.schema_, strict=given.strict
    )
    return ResponseFormat(type="json_schema", json_schema=schema)
