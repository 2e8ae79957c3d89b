"""Activations by name and the sinusoidal time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dppo_fast.types import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU,
    "ELU": nn.ELU,
    "GELU": nn.GELU,
    "Tanh": nn.Tanh,
    "Mish": nn.Mish,
    "SiLU": nn.SiLU,
    "Softplus": nn.Softplus,
    "Identity": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """A new activation module. Raises UserError for a name that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation={name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class SinusoidalPosEmb(nn.Module):
    """t [n] -> [n, dim]: sin then cos of t * exp(-ln(1e4) / (dim/2 - 1) * i) (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise UserError(f"time_dim={dim} must be even and at least 4")
        half = dim // 2
        frequency = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(self.frequency.dtype)[:, None] * self.frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1)
