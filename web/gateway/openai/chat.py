"""POST /v1/chat/completions: messages through the model's chat template, then as a completion."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from msgspec.structs import replace

from controlplane.contract.errors import RequestError
from web.gateway.errors import ApiError
from web.gateway.model import INLINE_CHARS_MAX
from web.gateway.openai import answers
from web.gateway.openai.call_ids import CallIds
from web.gateway.openai.chat_output import chat_grammar, check_tools, output_rules
from web.gateway.openai.events import ChunkWriter
from web.gateway.openai.generation import Generation, Plan
from web.gateway.openai.messages import Message, plain
from web.gateway.openai.prepared import PreparedRequest, digest_of
from web.gateway.openai.requests import INT64_MAX, ChatRequest, parse
from web.gateway.openai.sampling import check_chars, check_length, make_sampling, text_rules
from web.gateway.openai.structured import DEMANDS
from web.gateway.openai.tools import Function, Tool, ToolUse, tool_use
from web.gateway.openai.whole_answer import Whole
from web.gateway.service import Service
from web.gateway.text.choice_decoder import Piece

INLINE_MESSAGES_MAX = 64  # longer conversations are rendered in a thread


async def prepare_chat(service: Service, body: bytes, seed: int) -> PreparedRequest:
    """Check everything. Raises ApiError."""
    request = parse(ChatRequest, body)
    service.check_model(request.model)
    service.check_priority(request.priority)
    model = service.model
    use = tool_use(request.tools, request.tool_choice)
    if use is not None:
        check_tools(model, use)
    prompt = await chat_prompt(
        service,
        request.messages,
        request.add_generation_prompt is not False,
        bool(request.add_special_tokens),
        request.template_variables,
        use,
    )
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is None:
        check_length(model, len(prompt), 1)
        max_tokens = min(model.max_model_len - len(prompt), model.max_new_tokens or model.max_model_len)
    seed = request.seed if request.seed is not None else seed
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    grammar = await chat_grammar(model, request, prompt)
    sampling = make_sampling(request, model, len(prompt), max_tokens, seed, logprobs, grammar)
    plans = [Plan(prompt, replace(sampling, seed=(seed + n) & INT64_MAX)) for n in range(request.choices)]
    return _prepared(service, slim(request), plans, digest_of(request, plans))


def slim(request: ChatRequest) -> ChatRequest:
    """The request without what its plans say."""
    nothing = [Message(role="user", content="")]
    # Parsers know tools by their names.
    tools = [
        Tool(type="function", function=Function(name=tool.function.name)) for tool in request.tools or ()
    ]
    spoken = {"messages": nothing, "chat_template_kwargs": None, "logit_bias": None, "tools": tools or None}
    return request.model_copy(update=spoken | dict.fromkeys(DEMANDS))


def kept_chat(service: Service, options: bytes) -> PreparedRequest:
    """What `PreparedRequest.options` was made of, with no plans: the logs have them."""
    return _prepared(service, slim(parse(ChatRequest, options)), [], b"")


def _prepared(service: Service, request: ChatRequest, plans: list[Plan], digest: bytes) -> PreparedRequest:
    return PreparedRequest(
        request,
        plans,
        text_rules(request, service.model, bool(request.logprobs), output_rules(request, service.model)),
        lambda generation, request_id, created: ChatFormat(
            service, request, generation, f"chatcmpl-{request_id}", created
        ),
        digest,
    )


async def chat_prompt(
    service: Service,
    messages: list[Message],
    add_generation_prompt: bool,
    add_special_tokens: bool,
    extra: dict[str, Any] | None = None,
    use: ToolUse | None = None,
) -> tuple[int, ...]:
    """Token ids of a conversation. Raises ApiError."""
    model = service.model
    template = model.template
    if template is None:
        raise ApiError(400, f"{model.no_template}: use /v1/completions", "messages")
    tools = None
    if use is not None:
        template, tools = template.for_tools, use.described
    chars = sum(len(message.text) for message in messages)
    check_chars(model, chars, "messages")
    try:
        given = plain(messages, template.goes_through_parts, template.takes_strings)
        if extra or tools or len(messages) > INLINE_MESSAGES_MAX or chars > INLINE_CHARS_MAX:
            text = await asyncio.to_thread(template.render, given, add_generation_prompt, extra, tools)
        else:
            text = template.render(given, add_generation_prompt)
    except RequestError as error:
        raise ApiError(400, str(error), "messages") from error
    return tuple(await model.encode(text, add_special_tokens))


class ChatFormat:
    """OpenAI's chat.completion objects, with vLLM's stop_reason and, when asked for, token ids."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        generation: Generation,
        answer_id: str,
        created_unix_s: int,
    ) -> None:
        head = {"id": answer_id, "created": created_unix_s, "model": service.model.name}
        self._head = head | {"object": "chat.completion"}
        self._vocabulary = service.model.vocabulary
        self._request = request
        self._generation = generation
        self._ids = CallIds(answer_id, created_unix_s, service.model.output.tools, generation.plans)
        self._reasoning = request.include_reasoning is not False
        self._wholes = [Whole() for _ in generation.plans]
        self._writer = ChunkWriter(head | {"object": "chat.completion.chunk"}, generation, request, 1)

    def chunk(self, index: int, piece: Piece) -> bytes:
        request = self._request
        if not self._reasoning:
            piece.reasoning = ""
        parts = bool(piece.reasoning or piece.calls)
        if not (
            parts
            or piece.text
            or piece.finish
            or (piece.tokens and (request.return_token_ids or request.logprobs))
        ):
            return b""  # all of it is held back
        if piece.finish is None and not request.logprobs and not parts:
            return self._writer.plain_event(index, piece, lambda: self._delta(index, Piece()))
        return self._writer.event(index, self._delta(index, piece))

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.text or not (piece.finish or piece.reasoning or piece.calls):
            delta["content"] = piece.text
        if piece.calls:
            new_id = partial(self._ids.new, index)
            delta["tool_calls"] = [answers.tool_call_delta(part, new_id) for part in piece.calls]
        choice = answers.chat_delta(index, delta, piece, self._logprobs(piece))
        if self._request.return_token_ids:
            choice["token_ids"] = [token.token for token in piece.tokens]
        return choice

    def opening(self, index: int) -> bytes:
        """The role, before the first text."""
        delta = {"role": "assistant", "content": ""}
        choice = answers.chat_delta(index, delta, Piece(), None)
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = self._generation.plans[index].prompt
        return self._writer.event(index, choice)

    def last(self) -> bytes:
        return self._writer.usage_event()

    def keep(self, index: int, piece: Piece) -> int:
        if not self._reasoning:
            piece.reasoning = ""
        return self._wholes[index].add(piece, self._logprobs(piece))

    def body(self) -> dict[str, Any]:
        choices = []
        for index, whole in enumerate(self._wholes):
            piece = whole.piece
            calls = [answers.tool_call(call, partial(self._ids.new, index)) for call in piece.calls]
            choice = answers.chat_choice(index, piece, calls, whole.logprobs)
            if self._request.return_token_ids:
                choice["token_ids"] = whole.ids
            choices.append(choice)
        body = self._head | {"choices": choices, "usage": self._writer.usage()}
        if self._request.return_token_ids:
            body["prompt_token_ids"] = self._generation.plans[0].prompt
        return body

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return answers.chat_logprobs(self._vocabulary, piece, self._request.top_logprobs or 0)
