"""How many positions a checkpoint takes, of its config.json: what gateways and nodes have to agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POSITIONS = "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


def positions_of(config: Mapping[str, Any]) -> int | None:
    """`max_position_embeddings` as it is; None where there is none."""
    value = config.get(POSITIONS)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def positions_max(config: Mapping[str, Any], default: int | None = None) -> int | None:
    """The longest context: `max_position_embeddings` (else `default`), and what yarn and dynamic rotary embeddings
    stretch the model to beyond it. Values of the wrong type count as none: who loads the model refuses them."""
    positions = positions_of(config) or default
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if positions and isinstance(section, dict) and section:
            return max(positions, _stretched(config, section, positions))
    return positions


def _stretched(config: Mapping[str, Any], section: Mapping[str, Any], positions: int) -> int:
    factor = section.get("factor")
    if config.get("model_type") == "phi3" or isinstance(factor, bool) or not isinstance(factor, int | float):
        return 0
    match section.get("rope_type", section.get("type")):
        case "dynamic":
            trained: Any = positions
        case "yarn":
            trained = config.get(ORIGINAL) or section.get(ORIGINAL) or positions
        case _:
            return 0
    reached = trained * factor if isinstance(trained, int) else 0
    return int(reached) if 0 < reached < 1 << 31 else 0
