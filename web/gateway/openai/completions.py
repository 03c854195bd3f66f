"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from web.gateway.errors import ApiError
from web.gateway.openai import answers
from web.gateway.openai.events import ChunkWriter, failure_event
from web.gateway.openai.generation import Generation, Plan
from web.gateway.openai.grammar_check import grammar_of
from web.gateway.openai.long_lists import LongList
from web.gateway.openai.prepared import Origin, PreparedRequest, digest_of
from web.gateway.openai.prompt_cut import cut
from web.gateway.openai.prompt_scores import check_scores, echo_logprobs, prompt_logprobs
from web.gateway.openai.requests import CompletionRequest, parse
from web.gateway.openai.sampling import check_chars, check_tokens, choices_of, make_sampling, text_rules
from web.gateway.openai.structured import DEMANDS
from web.gateway.openai.whole_answer import Whole, best
from web.gateway.service import Service
from web.gateway.text.choice_decoder import Piece
from web.gateway.text.detok import text_of

MAX_TOKENS = 16  # OpenAI's and vLLM's default


async def prepare_completion(service: Service, body: bytes, origin: Origin) -> PreparedRequest:
    """Check everything. Raises ApiError."""
    request = parse(CompletionRequest, body)
    service.check_model(request.model)
    service.check_priority(request.priority)
    default = min(MAX_TOKENS, service.model.max_new_tokens or MAX_TOKENS)
    grammar = await grammar_of(service.model, request, origin.owner)
    shared = make_sampling(request, service.model, request.logprobs, grammar)
    plans: list[Plan] = []
    for number, prompt in enumerate(request.prompts):
        if number:
            await asyncio.sleep(0)  # other streams go on meanwhile
        ids = await prompt_ids(service, request, prompt)
        top = max(
            (k for k in (request.echoed_logprobs, request.prompt_logprobs) if k is not None), default=None
        )
        if top is not None:
            param = "prompt_logprobs" if request.echoed_logprobs is None else "logprobs"
            check_scores(service.model, len(ids), top, param, bool(request.stream))
        seed = request.seed if request.seed is not None else origin.seed
        # What nobody asked for is not refused for being too much.
        wanted = 1 if request.nothing_new else request.max_tokens
        max_tokens = wanted or max(1, min(default, service.model.max_model_len - len(ids)))
        plans += choices_of(shared, service.model, ids, max_tokens, seed, request.choices, top)
    return _prepared(service, slim(service, request, plans), plans, digest_of(request, plans))


def slim(service: Service, request: CompletionRequest, plans: Sequence[Plan]) -> CompletionRequest:
    """The request without what its plans say. Of the prompts there is only their text, if it is to be echoed."""
    texts = [""] * len(request.prompts)
    if request.echo:
        skip = request.skip_special_tokens is not False
        # What is cut, or named token by token, is told as the tokens say it.
        exact = request.truncate_prompt_tokens is not None or request.echoed_logprobs is not None
        prompts = [plan.prompt for plan in plans[:: request.choices]] if exact and plans else request.prompts
        # Up to a character that the answer goes on with.
        texts = [p if isinstance(p, str) else text_of(service.model.tokenizer, p, skip)[0] for p in prompts]
    said = dict.fromkeys(("logit_bias", "bad_words", "truncate_prompt_tokens", *DEMANDS))
    return request.model_copy(update={"prompt": texts, **said})


def kept_completion(service: Service, options: bytes) -> PreparedRequest:
    """What `PreparedRequest.options` was made of, with no plans: the logs have them."""
    return _prepared(service, slim(service, parse(CompletionRequest, options), []), [], b"")


def _prepared(
    service: Service, request: CompletionRequest, plans: list[Plan], digest: bytes
) -> PreparedRequest:
    return PreparedRequest(
        request,
        plans,
        text_rules(request, service.model, request.logprobs is not None),
        lambda generation, request_id, created: CompletionFormat(
            service, request, generation, f"cmpl-{request_id}", created
        ),
        digest,
        prompts=len(request.prompts),
    )


async def prompt_ids(
    service: Service, request: CompletionRequest, prompt: str | list[int]
) -> tuple[int, ...]:
    """Token ids of one prompt, checked. Raises ApiError."""
    if isinstance(prompt, list):
        if not prompt:
            raise ApiError(400, "a prompt has no tokens", "prompt")
        check_tokens(service.model, prompt, "prompt")
        return tuple(cut(request, service.model, prompt, request.max_tokens))
    if request.truncate_prompt_tokens is None:
        check_chars(service.model, len(prompt), "prompt")
    ids = await service.model.encode(prompt, request.add_special_tokens is not False)
    return tuple(cut(request, service.model, ids, request.max_tokens))


class CompletionFormat:
    """OpenAI's text_completion objects, with vLLM's stop_reason and, when asked for, token ids."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        generation: Generation,
        answer_id: str,
        created_unix_s: int,
    ) -> None:
        self._head = {
            "id": answer_id,
            "object": "text_completion",
            "created": created_unix_s,
            "model": service.model.name,
        }
        self._request = request
        self._generation = generation
        self._writer = ChunkWriter(self._head, generation, request, len(request.prompts), request.nothing_new)
        self._model = service.model
        count = len(generation.plans)
        self._begun = [False] * count
        self._echo = [str(request.prompts[index // request.choices]) for index in range(count)]
        self._wholes = [Whole(echo) for echo in self._echo]
        self._vocabulary = service.model.vocabulary

    def opening(self, index: int) -> bytes:
        return b""

    def chunk(self, index: int, piece: Piece) -> bytes:
        if not (piece.tokens or piece.finish):
            return b""  # all of it is held back
        if self._request.nothing_new:
            piece = _only_end(piece)
        ids, logprobs = self._request.return_token_ids, self._request.logprobs is not None
        if self._begun[index] and piece.finish is None and not logprobs and (piece.text or ids):
            return self._writer.plain_event(index, piece, lambda: self._later(index, Piece()))
        if not self._begun[index]:
            piece.text = self._echo[index] + piece.text
        if not (piece.text or piece.finish or ids or logprobs):
            return b""
        choice = self._later(index, piece) if self._begun[index] else self._event(index, piece)
        self._begun[index] = True
        return self._writer.event(index, choice)

    def long_rest(self, id_line: Callable[[], bytes]) -> None:
        return None

    def last(self) -> bytes:
        return self._writer.usage_event()

    def failure(self, error: ApiError, opened: bool) -> bytes:
        return failure_event(error)

    def keep(self, index: int, piece: Piece) -> int:
        if self._request.nothing_new:
            piece = _only_end(piece)
        logprobs = None if self._request.logprobs is None else self._new_logprobs(index, piece)
        return self._wholes[index].add(piece, logprobs)

    def body(self) -> dict[str, Any]:
        choices = []
        for at, index in enumerate(best(self._wholes, self._request)):
            whole = self._wholes[index]
            logprobs = whole.logprobs
            if self._request.echoed_logprobs is not None:
                echoed = Whole()
                echoed.add(Piece(), self._echo_logprobs(index, whole.prompt_scores))
                echoed.join(whole)
                logprobs = echoed.logprobs
            ids = [] if self._request.nothing_new else whole.ids
            choice = self._choice(index, whole.piece, logprobs, ids) | {"index": at}
            if (top := self._request.prompt_logprobs) is not None:
                plan = self._generation.plans[index]
                of = plan.sampling.prompt_logprobs or 0
                choice["prompt_logprobs"] = LongList(
                    prompt_logprobs(self._model, plan.prompt, whole.prompt_scores, of, top)
                )
            choices.append(choice)
        return self._head | {"choices": choices, "usage": self._writer.usage()}

    def _event(self, index: int, piece: Piece) -> dict[str, Any]:
        ids = [] if self._request.nothing_new else [token.token for token in piece.tokens]
        return self._choice(index, piece, self._logprobs(index, piece), ids)

    def _later(self, index: int, piece: Piece) -> dict[str, Any]:
        """In any but the first chunk: that one has the ids of the prompt."""
        choice = self._event(index, piece)
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = None
        return choice

    def _choice(
        self, index: int, piece: Piece, logprobs: dict[str, Any] | None, ids: list[int]
    ) -> dict[str, Any]:
        if self._request.nothing_new and piece.finish:
            piece.finish, piece.stop_reason = "length", None
        choice = answers.completion_choice(index, piece, logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = ids
            choice["prompt_token_ids"] = self._generation.plans[index].prompt
        return choice

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        new = self._new_logprobs(index, piece)
        if self._request.echo and piece.tokens and piece.tokens[0].prompt_scores is not None:
            echoed = self._echo_logprobs(index, piece.tokens[0].prompt_scores)
            new = {name: part + new[name] for name, part in echoed.items()}
        return new

    def _echo_logprobs(self, index: int, scores: bytes) -> dict[str, Any]:
        plan, skip = self._generation.plans[index], self._request.skip_special_tokens is not False
        of, top = plan.sampling.prompt_logprobs or 0, self._request.logprobs or 0
        return echo_logprobs(self._model, plan.prompt, scores, of, top, skip)

    @property
    def heavy(self) -> bool:
        return any(plan.sampling.prompt_logprobs is not None for plan in self._generation.plans)

    def _new_logprobs(self, index: int, piece: Piece) -> dict[str, Any]:
        if self._request.nothing_new:
            piece = Piece()
        return answers.completion_logprobs(self._vocabulary, piece, len(self._echo[index]))


def _only_end(piece: Piece) -> Piece:
    """Of a piece that nobody is to see: the tokens stay, for what the first one brings of the prompt."""
    return Piece(tokens=piece.tokens, spans=piece.spans, finish=piece.finish, silent=piece.silent)
