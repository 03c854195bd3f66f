"""What the chunks of both APIs share: the fixed beginning, the usage, the encoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from web.gateway.errors import ApiError
from web.gateway.openai import answers
from web.gateway.openai.generation import Generation
from web.gateway.openai.long_lists import one_line
from web.gateway.openai.requests import Common
from web.gateway.text.choice_decoder import ChoiceDecoder, Piece

_to_json = msgspec.json.Encoder().encode


def encode_line(value: Any) -> bytes:
    return one_line(_to_json(value))


def failure_event(error: ApiError) -> bytes:
    return b"data: " + error.encode() + b"\n\n"


class ChunkWriter:
    """Writes one event for one choice; only the choice itself is encoded anew each time."""

    def __init__(
        self,
        head: dict[str, Any],
        generation: Generation,
        request: Common,
        prompts: int,
        hidden: bool = False,
    ) -> None:
        """`hidden`: what is generated is not shown, and does not count."""
        self._hidden = hidden
        self._head = head
        self._prefix = b"data: " + encode_line(head)[:-1] + b',"choices":['
        self._generation = generation
        self._per_prompt = len(generation.plans) // prompts
        self._plain: list[list[bytes] | None] = [None] * len(generation.plans)
        self._include = request.include_usage
        self._tail = b'],"usage":null}\n\n' if self._include else b"]}\n\n"
        self._continuous = request.continuous_usage

    def event(self, index: int, choice: dict[str, Any]) -> bytes:
        return self._prefix + encode_line(choice) + self._tail_of(index)

    def plain_event(self, index: int, piece: Piece, like: Callable[[], dict[str, Any]]) -> bytes:
        """As `event`, for a choice of which nothing but text and token ids differs from one event to the next.

        `like`: such a choice with an empty text, and an empty list of token ids if there is to be one.
        """
        holes = self._plain[index]
        if holes is None:
            holes = self._plain[index] = re.split(rb'""|\[\]', encode_line(like()))
        out = self._prefix + holes[0] + encode_line(piece.text) + holes[1]
        if len(holes) > 2:
            out += encode_line([token.token for token in piece.tokens]) + holes[2]
        return out + self._tail_of(index)

    def usage_event(self) -> bytes:
        if not self._include:
            return b""
        return self._prefix + b'],"usage":' + encode_line(self.usage()) + b"}\n\n"

    def usage(self) -> dict[str, Any]:
        """Of the whole request: each prompt counts once, however many choices were made of it."""
        plans = self._generation.plans
        prompts = range(0, len(plans), self._per_prompt)
        choices = self._generation.choices
        return self._usage(
            sum(len(plans[i].prompt) for i in prompts), sum(choices[i].cached for i in prompts), choices
        )

    def _tail_of(self, index: int) -> bytes:
        if self._continuous:
            return b'],"usage":%b}\n\n' % encode_line(self._usage_of(index))
        return self._tail

    def _usage_of(self, index: int) -> dict[str, Any]:
        generation = self._generation
        choice = generation.choices[index]
        return self._usage(len(generation.plans[index].prompt), choice.cached, [choice])

    def _usage(
        self, prompt_tokens: int, cached_tokens: int, choices: Sequence[ChoiceDecoder]
    ) -> dict[str, Any]:
        reasons = any(choice.reasons for choice in choices)
        return answers.usage(
            prompt_tokens,
            cached_tokens if self._generation.tells_cached else None,
            0 if self._hidden else sum(choice.tokens for choice in choices),
            sum(choice.reasoning_tokens for choice in choices) if reasons else None,
        )
