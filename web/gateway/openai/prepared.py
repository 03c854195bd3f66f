"""What a body asks for, checked: the same whether it comes for the first time or again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from controlplane.contract.request_bytes import TOKEN_BYTES, json_bytes, sampling_bytes
from web.gateway.openai.answer_format import AnswerFormat
from web.gateway.openai.generation import Generation, Plan
from web.gateway.openai.prompt_scores import written_bytes
from web.gateway.openai.requests import Request
from web.gateway.text.choice_decoder import TextRules

_encode = msgspec.msgpack.Encoder().encode
CHOICE_BYTES = 8 << 10  # a request's objects in router, queue, detokenizer
ID_BYTES = 8  # of a token id as it is written in an answer
NOT_IN_DIGEST = {"prompt", "messages", "request_id", "priority"}  # prompts count as tokens


@dataclass(frozen=True, slots=True)
class Origin:
    """What an answer depends on beside its body, the same when it is asked for again; and whose it is."""

    seed: int  # unless the body has one
    created_unix_s: int  # the day and the hour that a chat template tells
    owner: bytes = b""  # the hash of the API key


class Asked(Protocol):
    """Of a body of any of the APIs. `choices` are generated for a prompt."""

    stream: bool | None
    stream_options: Any
    request_id: str | None
    priority: int | None

    @property
    def choices(self) -> int: ...

    @property
    def return_token_ids(self) -> bool | None: ...

    def model_dump_json(
        self, *, by_alias: bool, exclude: Any, exclude_unset: bool, exclude_none: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """`request` without what the plans say already: prompts as tokens, the sampling."""

    request: Asked
    plans: list[Plan]
    rules: TextRules
    # Of a generation, the answer's id and its time (unix seconds).
    form: Callable[[Generation, str, int], AnswerFormat]
    digest: bytes = b""  # see `digest_of`
    prompts: int = 1
    told_again: bool = False  # see Generation

    @property
    def count(self) -> int:
        """Choices of all prompts."""
        return self.prompts * self.request.choices

    @property
    def options(self) -> bytes:
        """All that a gateway needs beside the logs to go on with the answer; what `KEPT` reads."""
        return self.request.model_dump_json(
            by_alias=True,
            exclude={"stream_options": {"include_event_ids"}},
            exclude_unset=True,
            exclude_none=True,
        ).encode()

    @property
    def event_ids(self) -> bool:
        """Whether a stream's events have them."""
        options = self.request.stream_options
        return options is None or options.include_event_ids is not False


def kept_bytes(prepared: PreparedRequest, options: bytes, blobs: Iterable[bytes]) -> int:
    """About what a request keeps until its answer is over. `options`: its own, or those that its logs brought; `blobs`:
    what goes along with its choices. What choices share counts once."""
    plans, request = prepared.plans, prepared.request
    prompts = {id(plan.prompt): len(plan.prompt) for plan in plans}
    scores = sum(
        written_bytes(len(plan.prompt), top)
        for plan in plans
        if (top := plan.sampling.prompt_logprobs) is not None
    )
    told = ID_BYTES * sum(len(plan.prompt) for plan in plans) if request.return_token_ids else 0
    return (
        CHOICE_BYTES * len(plans)
        + TOKEN_BYTES * sum(prompts.values())
        + sampling_bytes(plan.sampling for plan in plans)
        + json_bytes(options)
        + prepared.rules.bytes_kept
        + scores
        + told
        + sum({id(blob): len(blob) for blob in blobs}.values())
    )


def digest_of(request: Request, plans: Sequence[Plan]) -> bytes:
    """Equal for equal answers: of the prompts' tokens, the sampling with its seeds, and what shapes the text."""
    options = request.model_dump_json(exclude=NOT_IN_DIGEST, exclude_none=True)
    return hashlib.sha256(_encode((type(request).__name__, options, plans))).digest()[:8]
