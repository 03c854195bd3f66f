"""The base of all parts of request bodies, and what of them says nothing (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from web.gateway.errors import ApiError, shorten

# Of a part of a request: where others may cache.
CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})
# What other servers gave along with an answer, and want back.
PROVIDER_HINTS = frozenset({"extra_content", "provider_specific_fields"})
Neutrals = Mapping[str, tuple[Any, ...]]  # by name: the values that say nothing


def same(value: Any, neutral: Any) -> bool:
    """Python takes 0 for False; JSON does not."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class Strict(BaseModel):
    """What is null says nothing, whatever its name. `hints`: names that say nothing whatever their value; `neutrals`:
    those that say nothing with some."""

    model_config = ConfigDict(strict=True, extra="forbid")
    hints: ClassVar[frozenset[str]] = frozenset()
    neutrals: ClassVar[Neutrals] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_silent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name in cls.model_fields
            or not (value is None or name in cls.hints or cls._neutral(name, value))
        }

    @classmethod
    def _neutral(cls, name: str, value: Any) -> bool:
        return any(same(value, neutral) for neutral in cls.neutrals.get(name, ()))


class Lenient(Strict):
    """What clients decorate: a tool, a part of a message."""

    hints = CACHE_HINTS


def check_kind(part: Any, known: frozenset[str], param: str, what: str) -> None:
    """Raises ApiError: `part` says that it is of a type which is none of the `known` ones. pydantic would say what the
    branches of a union lack, and not what is wrong with it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in known:
        text = (
            f"{param}: {what} of the type {shorten(kind)} are not supported, only {', '.join(sorted(known))}"
        )
        raise ApiError(400, text, param)
