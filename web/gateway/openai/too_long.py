"""What exceeds the context, in the words and with the code by which clients know that a shorter prompt would do."""

from __future__ import annotations

from typing import Any

from web.gateway.errors import ApiError

CODE = "context_length_exceeded"


class TooLong(ApiError):
    @property
    def body(self) -> dict[str, Any]:
        return {"error": super().body["error"] | {"code": CODE}}


def too_long(limit: int, why: str, param: str) -> TooLong:
    """`limit`: tokens of the context."""
    text = f"This model's maximum context length is {limit} tokens. However, {why}."
    return TooLong(400, text, param)
