"""How long a context a checkpoint takes: one answer for gateways and nodes."""

from typing import Any

import pytest

from controlplane.positions import positions_max


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, None),
        ({"max_position_embeddings": "4096"}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.5}}, 10240),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 2}}, 8192),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": "4"}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 1e300}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": float("nan")}}, 4096),
        (
            {"model_type": "phi3", "max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4}},
            4096,
        ),
    ],
)  # fmt: skip
def test_positions(config: dict[str, Any], wanted: int | None) -> None:
    assert positions_max(config) == wanted
    if wanted is None:
        assert positions_max(config, 77) == 77
