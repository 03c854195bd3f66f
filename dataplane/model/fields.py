"""The JSON files of a checkpoint, read key by key."""

import json
from pathlib import Path
from typing import Any

from dataplane.model.errors import ModelError


class Fields:
    """Typed access to one JSON object; everything wrong becomes a ModelError naming file and key."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def error(self, key: str, reason: str) -> ModelError:
        return ModelError(self.path, self.prefix + key, reason)

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"expected an integer from {low} to {high}, found {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(key, f"expected a positive number, found {value!r:.80}")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A positive number; None where it is absent or null."""
        return None if self.values.get(key) is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, f"expected a list of {count} numbers, found {value!r:.80}")
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int | float) or not 0 < one < 1e30:
                raise self.error(key, f"expected positive numbers, found {one!r:.80}")
        return tuple(float(one) for one in value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r:.80}")
        return value

    def section(self, key: str) -> "Fields | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, found {value!r:.80}")
        return Fields(self.path, value, f"{self.prefix}{key}.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(path, None, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(path, None, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(path, None, "is not a JSON object")
    return value
