"""The base of all parts of request bodies, and what of them says nothing (pure)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

# Of a part of a request: where others may cache.
CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Lenient(Strict):
    """What clients decorate with hints, or with fields that are null."""

    @model_validator(mode="before")
    @classmethod
    def _drop_hints(cls, data: Any) -> Any:
        return without_hints(cls, data) if isinstance(data, dict) else data


def without_hints(kind: type[Strict], data: dict[str, Any]) -> dict[str, Any]:
    """Of a message, a tool, or a part of one. What is null says nothing, whatever its name."""
    return {
        name: value
        for name, value in data.items()
        if name in kind.model_fields or not (value is None or name in CACHE_HINTS)
    }
