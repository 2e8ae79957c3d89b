"""Value networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dppo_fast.networks.mlp import trunk
from dppo_fast.types import Obs


class CriticObs(nn.Module):
    """State-value function V(obs): an MLP over the flattened state history -> [B]."""

    def __init__(
        self,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        activation_type: str = "Mish",
        use_layernorm: bool = False,
        residual_style: bool = False,
    ) -> None:
        super().__init__()
        self.Q1 = trunk(
            [cond_dim, *mlp_dims, 1], activation_type, use_layernorm=use_layernorm, residual_style=residual_style
        )

    def forward(self, obs: Obs) -> Tensor:
        value: Tensor = self.Q1(obs["state"].flatten(1))
        return value.squeeze(-1)
