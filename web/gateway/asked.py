"""What a body asks for, checked: the same whether it comes for the first time or again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from web.gateway.choice import TextRules
from web.gateway.generation import Generation, Plan
from web.gateway.openai import Common
from web.gateway.stream import Format

_encode = msgspec.msgpack.Encoder().encode
NOT_IN_DIGEST = {"prompt", "messages", "request_id", "priority"}  # prompts count as tokens


@dataclass(frozen=True, slots=True)
class Asked:
    request: Common
    plans: list[Plan]
    rules: TextRules
    form: Callable[
        [Generation, str, int], Format
    ]  # of a generation, the answer's id and its time (unix seconds)

    @property
    def digest(self) -> bytes:
        """Equal for equal answers: of the prompts' tokens, the sampling with its seeds, and what shapes the text."""
        options = self.request.model_dump_json(exclude=NOT_IN_DIGEST, exclude_none=True)
        parts = (type(self.request).__name__, options, self.plans)
        return hashlib.sha256(_encode(parts)).digest()[:8]
