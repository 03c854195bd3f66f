"""What the chunks of both APIs share: the fixed beginning, the usage, the encoding."""

from __future__ import annotations

from typing import Any

import msgspec

from web.gateway import shapes
from web.gateway.generation import Generation
from web.gateway.openai import Common

_encode = msgspec.json.Encoder().encode


class ChunkWriter:
    """Writes one event for one choice; only the choice itself is encoded anew each time."""

    def __init__(self, head: dict[str, Any], generation: Generation, request: Common, prompts: int) -> None:
        self._head = head
        self._prefix = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._generation = generation
        self._per_prompt = len(generation.plans) // prompts
        self._include = request.include_usage
        self._continuous = request.continuous_usage

    def event(self, index: int, choice: dict[str, Any]) -> bytes:
        tail = b"]"
        if self._continuous:
            tail += b',"usage":' + _encode(self._usage_of(index))
        elif self._include:
            tail += b',"usage":null'
        return self._prefix + _encode(choice) + tail + b"}\n\n"

    def usage_event(self) -> bytes:
        if not self._include:
            return b""
        return self._prefix + b'],"usage":' + _encode(self.usage()) + b"}\n\n"

    def usage(self) -> dict[str, int]:
        """Of the whole request: each prompt counts once, however many choices were made of it."""
        plans = self._generation.plans
        prompt = sum(len(plans[i].prompt) for i in range(0, len(plans), self._per_prompt))
        return shapes.usage(prompt, sum(choice.tokens for choice in self._generation.choices))

    def _usage_of(self, index: int) -> dict[str, int]:
        generation = self._generation
        return shapes.usage(len(generation.plans[index].prompt), generation.choices[index].tokens)
