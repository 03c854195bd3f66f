"""A layer's mixture of experts on a GPU: its weights, and the room that its steps need."""

from dataclasses import dataclass

import torch

from kernels.base import Activation, CannotCompute, Experts
from kernels.triton.experts import add_pairs, expert_linear, route, tiles_of
from kernels.triton.linear import linear
from kernels.triton.rows import gated_mul


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """router [experts, hidden]; gate_up [experts, 2 intermediate, hidden]; down [experts, hidden, intermediate]."""

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    chosen: int
    normalised: bool

    @classmethod
    def load(cls, mixture: Experts, device: torch.device, dtype: torch.dtype) -> "DeviceExperts":
        """Quantised weights become their values. Raises CannotCompute for experts with biases."""
        if any(mlp.gate_up.bias is not None or mlp.down.bias is not None for mlp in mixture.experts):
            raise CannotCompute("experts with biases have no kernels for GPUs")
        first = mixture.experts[0]
        shapes = (first.gate_up.shape, first.down.shape)
        gate_up, down = (
            torch.empty(len(mixture.experts), *shape, dtype=dtype, device=device) for shape in shapes
        )
        for index, mlp in enumerate(mixture.experts):
            gate_up[index].copy_(mlp.gate_up.dense(dtype))
            down[index].copy_(mlp.down.dense(dtype))
        router = mixture.router.to(device, dtype).contiguous()
        return cls(router, gate_up, down, mixture.chosen, mixture.normalised)


class Routes:
    """What steps of up to `rows` rows compute between the operations of mixtures, which are of one shape in a stage."""

    def __init__(self, mixture: DeviceExperts, rows: int) -> None:
        count, wide, hidden = mixture.gate_up.shape
        pairs, like = rows * mixture.chosen, mixture.gate_up

        def room(height: int, width: int, dtype: torch.dtype = like.dtype) -> torch.Tensor:
            return torch.zeros(height, width, dtype=dtype, device=like.device)

        self.logits = room(rows, count, torch.float32)
        self.weights = room(rows, mixture.chosen, torch.float32)
        self.chosen = room(rows, mixture.chosen, torch.int32)
        self.gate_up, self.activated, self.out = (
            room(pairs, wide),
            room(pairs, wide // 2),
            room(pairs, hidden),
        )

    def run(
        self, mixture: DeviceExperts, x: torch.Tensor, out: torch.Tensor, rows: int, activation: Activation
    ) -> None:
        """out = what the mixture makes of x, both [>=rows, hidden]. Only launches of fixed shapes."""
        linear(x, mixture.router, None, self.logits, rows)
        route(self.logits, self.weights, self.chosen, rows, mixture.normalised)
        order, tiles = tiles_of(self.chosen[:rows], len(mixture.router))
        expert_linear(x, mixture.gate_up, order, tiles, self.gate_up, mixture.chosen)
        gated_mul(self.gate_up, self.activated, len(order), activation)
        expert_linear(self.activated, mixture.down, order, tiles, self.out, 1)
        add_pairs(self.out, self.weights, out, rows)
