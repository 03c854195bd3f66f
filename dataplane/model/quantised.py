"""A checkpoint's weights as values, or as the quantised ones that they are."""

from __future__ import annotations

import torch

from dataplane.model.config import ModelConfig
from kernels.quantised import Quantised, Weight


def weight_of(config: ModelConfig, name: str, weights: dict[str, torch.Tensor]) -> Weight:
    """The weight `name`, [n, k]."""
    return weights[name]


def values_of(config: ModelConfig, name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor `name` as values."""
    weight = weight_of(config, name, weights)
    return weight.dense() if isinstance(weight, Quantised) else weight
