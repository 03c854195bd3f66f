"""The base of all parts of request bodies, and what of them says nothing (pure)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

# Of a part of a request: where others may cache.
CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})


class Strict(BaseModel):
    """What is null says nothing, whatever its name. `hints`: names that say nothing whatever their value."""

    model_config = ConfigDict(strict=True, extra="forbid")
    hints: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_silent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name in cls.model_fields or not (value is None or name in cls.hints)
        }


class Lenient(Strict):
    """What clients decorate: a tool, a part of a message."""

    hints = CACHE_HINTS
