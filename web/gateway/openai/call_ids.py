"""The ids of tool calls: functions of the stream, so that whoever goes on with it gives the same ones (pure)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from web.gateway.openai.generation import Plan
from web.gateway.text.parsers.output import ToolFormat

MISTRAL_CHARS = 9  # their templates refuse other ids
OPENAI_CHARS = 24


class CallIds:
    """Unlike for other answers, as long as these have another id, time, seed or conversation."""

    def __init__(
        self, answer_id: str, created_unix_s: int, kind: ToolFormat | None, plans: Sequence[Plan]
    ) -> None:
        self._head = f"{answer_id} {created_unix_s}".encode()
        self._mistral = kind is not None and kind.value.startswith("mistral")
        self._plans = plans

    def new(self, choice: int, call: int) -> str:
        """Of call `call` of choice `choice`."""
        plan = self._plans[choice]
        digest = hashlib.sha256(self._head + array("Q", plan.prompt).tobytes())
        digest.update(f"{plan.sampling.seed} {choice} {call}".encode())
        name = digest.hexdigest()
        return name[:MISTRAL_CHARS] if self._mistral else f"call_{name[:OPENAI_CHARS]}"
