"""The base of all parts of request bodies, and what of them says nothing (pure)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from web.gateway.errors import ApiError, shorten

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


def check_kind(part: Any, known: frozenset[str], param: str, what: str) -> None:
    """Raises ApiError: `part` says that it is of a type which is none of the `known` ones. pydantic would say what the
    branches of a union lack, and not what is wrong with it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in known:
        text = (
            f"{param}: {what} of the type {shorten(kind)} are not supported, only {', '.join(sorted(known))}"
        )
        raise ApiError(400, text, param)


def without_hints(kind: type[Strict], data: dict[str, Any]) -> dict[str, Any]:
    """Of a message, a tool, or a part of one. What is null says nothing, whatever its name."""
    return {
        name: value
        for name, value in data.items()
        if name in kind.model_fields or not (value is None or name in CACHE_HINTS)
    }
