"""POST /v1/chat/completions: messages through the model's chat template, then as a completion."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from controlplane.contract.errors import ConfigError, RequestError
from web.gateway.errors import ApiError
from web.gateway.model import INLINE_CHARS_MAX
from web.gateway.openai import answers
from web.gateway.openai.call_ids import CallIds
from web.gateway.openai.chat_output import chat_grammar, check_tools, output_rules
from web.gateway.openai.events import ChunkWriter, failure_event
from web.gateway.openai.generation import Generation, Plan
from web.gateway.openai.long_lists import LongList
from web.gateway.openai.messages import Message, mark_end, plain, up_to_mark
from web.gateway.openai.prepared import Origin, PreparedRequest, digest_of
from web.gateway.openai.prompt_cut import cut
from web.gateway.openai.prompt_scores import check_scores, prompt_logprobs
from web.gateway.openai.requests import ChatRequest, parse
from web.gateway.openai.sampling import check_chars, check_length, choices_of, make_sampling, text_rules
from web.gateway.openai.structured import DEMANDS
from web.gateway.openai.too_long import too_long
from web.gateway.openai.tools import Function, Tool, ToolUse, tool_use
from web.gateway.openai.whole_answer import Whole, best
from web.gateway.service import Service
from web.gateway.text.choice_decoder import Piece
from web.gateway.text.template import ChatTemplate, PromptTooLong

INLINE_MESSAGES_MAX = 64  # longer conversations are rendered in a thread


async def prepare_chat(service: Service, body: bytes, origin: Origin) -> PreparedRequest:
    """Check everything. Raises ApiError."""
    request = parse(ChatRequest, body)
    plans = await prepare_chat_request(service, request, origin)
    return _prepared(service, slim(request), plans, digest_of(request, plans))


async def prepare_chat_request(service: Service, request: ChatRequest, origin: Origin) -> list[Plan]:
    """A choice each. Raises ApiError."""
    service.check_model(request.model)
    service.check_priority(request.priority)
    model = service.model
    use = tool_use(request.tools, request.tool_choice)
    if use is not None:
        check_tools(model, use)
    prompt = await chat_prompt(
        service,
        request.messages,
        Prompting.of(request, request.template_variables, request.chat_template),
        origin.created_unix_s,
        use,
    )
    max_tokens = request.max_completion_tokens or request.max_tokens
    prompt = tuple(cut(request, model, list(prompt), max_tokens))
    if request.prompt_logprobs is not None:
        check_scores(model, len(prompt), request.prompt_logprobs, "prompt_logprobs", bool(request.stream))
    if max_tokens is None:
        check_length(model, len(prompt), 1)
        max_tokens = min(model.max_model_len - len(prompt), model.max_new_tokens or model.max_model_len)
    seed = request.seed if request.seed is not None else origin.seed
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    grammar = await chat_grammar(model, request, prompt, origin.owner)
    shared = make_sampling(request, model, logprobs, grammar)
    return choices_of(shared, model, prompt, max_tokens, seed, request.choices, request.prompt_logprobs)


def slim(request: ChatRequest) -> ChatRequest:
    """The request without what its plans say."""
    nothing = [Message(role="user", content="")]
    # Parsers know tools by their names.
    tools = [
        Tool(type="function", function=Function(name=tool.function.name)) for tool in request.tools or ()
    ]
    spoken = {
        "messages": nothing,
        "chat_template": None,
        "chat_template_kwargs": None,
        "logit_bias": None,
        "bad_words": None,
        "truncate_prompt_tokens": None,
        "tools": tools or None,
    }
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


class Prompted(Protocol):
    """What requests that have messages say of how they become a prompt."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None


@dataclass(frozen=True, slots=True)
class Prompting:
    """How messages become a prompt. `continued`: it ends within the last message; `extra`: variables of the template;
    `template`: the request's own."""

    begin_answer: bool
    continued: bool
    special_tokens: bool
    extra: dict[str, Any] | None
    template: str | None

    @classmethod
    def of(cls, request: Prompted, extra: dict[str, Any] | None, template: str | None = None) -> Prompting:
        continued = bool(request.continue_final_message)
        begin = not continued and request.add_generation_prompt is not False
        return cls(begin, continued, bool(request.add_special_tokens), extra, template)


async def chat_prompt(
    service: Service, messages: list[Message], how: Prompting, now_unix_s: int, use: ToolUse | None = None
) -> tuple[int, ...]:
    """Token ids of a conversation, as it is at `now_unix_s`. Raises ApiError."""
    model = service.model
    template = model.template
    if how.template is not None:
        template = await _own_template(service, how.template)
    if template is None:
        raise ApiError(400, f"{model.no_template}: use /v1/completions", "messages")
    tools = None
    if use is not None:
        template, tools = template.for_tools, use.described
    chars = sum(len(message.text) for message in messages)
    check_chars(model, chars, "messages")
    try:
        given = plain(
            messages, template.goes_through_parts, template.takes_strings, template.knows_developers
        )
        if how.continued:
            mark_end(given)
        begin, extra = how.begin_answer, how.extra
        long = len(messages) > INLINE_MESSAGES_MAX or chars > INLINE_CHARS_MAX
        if extra or tools or how.template is not None or long:
            text = await asyncio.to_thread(template.render, given, begin, extra, tools, now_unix_s)
        else:
            text = template.render(given, begin, now_unix_s=now_unix_s)
        if how.continued:
            text = up_to_mark(text)
    except PromptTooLong as error:
        raise too_long(model.max_model_len, f"the prompt is too long: {error}", "messages") from error
    except RequestError as error:
        raise ApiError(400, str(error), "messages") from error
    return tuple(await model.encode(text, how.special_tokens))


async def _own_template(service: Service, source: str) -> ChatTemplate:
    """One that came with a request. Raises ApiError."""
    if not service.request_chat_template:
        text = "chat_template: this gateway takes no templates from clients (gateway.request_chat_template)"
        raise ApiError(400, text, "chat_template")
    model = service.model
    chars_max = model.max_model_len * model.vocabulary.longest_chars
    try:
        return await asyncio.to_thread(ChatTemplate, source, model.special_tokens, chars_max)
    except ConfigError as error:
        raise ApiError(400, f"chat_template: {error}", "chat_template") from error


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
        self._model = service.model
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

    def long_rest(self, id_line: Callable[[], bytes]) -> None:
        return None

    def last(self) -> bytes:
        return self._writer.usage_event()

    def failure(self, error: ApiError, opened: bool) -> bytes:
        return failure_event(error)

    def keep(self, index: int, piece: Piece) -> int:
        if not self._reasoning:
            piece.reasoning = ""
        return self._wholes[index].add(piece, self._logprobs(piece))

    def body(self) -> dict[str, Any]:
        choices = []
        for at, index in enumerate(best(self._wholes, self._request)):
            whole = self._wholes[index]
            piece = whole.piece
            calls = [answers.tool_call(call, partial(self._ids.new, index)) for call in piece.calls]
            choice = answers.chat_choice(at, piece, calls, whole.logprobs)
            if self._request.return_token_ids:
                choice["token_ids"] = whole.ids
            choices.append(choice)
        body = self._head | {"choices": choices, "usage": self._writer.usage()}
        if self._request.return_token_ids:
            body["prompt_token_ids"] = self._generation.plans[0].prompt
        if (top := self._request.prompt_logprobs) is not None:
            plan, scores = self._generation.plans[0], self._wholes[0].prompt_scores
            body["prompt_logprobs"] = LongList(prompt_logprobs(self._model, plan.prompt, scores, top, top))
        return body

    @property
    def heavy(self) -> bool:
        return self._request.prompt_logprobs is not None

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return answers.chat_logprobs(self._vocabulary, piece, self._request.top_logprobs or 0)
