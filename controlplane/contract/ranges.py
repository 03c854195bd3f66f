"""Bounds of settings, written beside the field: `threads: Annotated[int, Range(1, 256)] = 1`."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from controlplane.contract.errors import ConfigError


class SettingsError(ConfigError, ValueError):
    """A setting that cannot be. Also a ValueError: msgspec adds to those where in a file the value stands."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both allowed. Whole where the field is an int; never NaN or infinite."""

    low: float
    high: float

    def fault(self, value: object) -> str | None:
        """What is wrong with the value; None if nothing is."""
        # No float is as large as some whole numbers are: comparisons bear those, isfinite does not. NaN is in no order.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and self.low <= value <= self.high:  # type: ignore[operator]
            return None
        return f"allowed are {self.low:,.12g} to {self.high:,.12g}"


@dataclass(frozen=True, slots=True)
class Text:
    """Strings of which the whole matches `pattern`; `what` says so in words."""

    pattern: str
    what: str

    def fault(self, value: object) -> str | None:
        """What is wrong with the value; None if nothing is."""
        if isinstance(value, str) and re.fullmatch(self.pattern, value):
            return None
        return f"allowed is {self.what}"


@dataclass(frozen=True, slots=True)
class Form:
    """Strings that `read` makes something of; what it raises ValueError for are none. `what` says so in words."""

    read: Callable[[str], object]
    what: str
    empty: bool = False  # whether nothing is allowed, too

    def fault(self, value: object) -> str | None:
        """What is wrong with the value; None if nothing is."""
        if value == "" and self.empty:
            return None
        try:
            if isinstance(value, str):
                self.read(value)
                return None
        except ValueError:
            pass
        return f"allowed is {self.what}"


Bound = Range | Text | Form


def parsed(raw: bytes, json: bool = False) -> Any:
    """A file of settings, TOML if it is not JSON. Raises ValueError, whatever is wrong with it."""
    try:
        return msgspec.json.decode(raw) if json else tomllib.loads(raw.decode())
    except RecursionError:
        raise ValueError("lists and tables stand in one another, far too deep") from None


def check_bounds(settings: msgspec.Struct, section: str = "") -> None:
    """Hold every field against its bound; in a tuple each item. Raises SettingsError naming field, value and bound."""
    for name, (kind, bound) in _bounds(type(settings)).items():
        value = getattr(settings, name)
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            fault = bound.fault(item)
            if fault is None and kind is int and not isinstance(item, int):
                fault = "allowed are whole numbers"
            if fault is not None:
                raise SettingsError(f"{section}{name} = {item!r}: {fault}")


@functools.cache
def _bounds(settings: type[msgspec.Struct]) -> dict[str, tuple[Any, Bound]]:
    """By field, its type and its bound."""
    found: dict[str, tuple[Any, Bound]] = {}
    for name, hint in get_type_hints(settings, include_extras=True).items():
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(item) is Annotated:
            kind, *extras = get_args(item)
            found.update((name, (kind, extra)) for extra in extras if isinstance(extra, Bound))
    return found
