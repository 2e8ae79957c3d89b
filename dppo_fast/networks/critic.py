"""Value networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dppo_fast.networks.mlp import trunk
from dppo_fast.types import Obs


class CriticObs(nn.Module):
    """State-value function V(obs): an MLP over the flattened state history -> [B].

    ``visual_dim`` is what a subclass's ``features`` adds.
    """

    def __init__(
        self,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        activation_type: str = "Mish",
        use_layernorm: bool = False,
        residual_style: bool = False,
        *,
        visual_dim: int = 0,
    ) -> None:
        super().__init__()
        dims = [visual_dim + cond_dim, *mlp_dims, 1]
        self.Q1 = trunk(dims, activation_type, use_layernorm=use_layernorm, residual_style=residual_style)

    def features(self, obs: Obs) -> Tensor:
        """What the network sees of the observation: the flattened state."""
        return obs["state"].flatten(1)

    def forward(self, obs: Obs) -> Tensor:
        value: Tensor = self.Q1(self.features(obs))
        return value.squeeze(-1)


class CriticObsAct(nn.Module):
    """Action-value functions Q(obs, action chunk): an MLP each over [flattened state, flattened chunk] -> [Q, B].

    Of the chunk they see the ``action_steps`` that are executed. Q is 2, or 1 without ``double_q``.
    """

    def __init__(
        self,
        cond_dim: int,
        action_dim: int,
        action_steps: int = 1,
        mlp_dims: Sequence[int] = (256, 256, 256),
        activation_type: str = "Mish",
        use_layernorm: bool = False,
        residual_style: bool = False,
        double_q: bool = True,
    ) -> None:
        super().__init__()
        self.action_steps = action_steps
        dims = [cond_dim + action_steps * action_dim, *mlp_dims, 1]
        for name in ("Q1", "Q2")[: 1 + double_q]:
            self.add_module(name, trunk(dims, activation_type, "Identity", use_layernorm, residual_style))

    def features(self, obs: Obs) -> Tensor:
        """What the network sees of the observation: the flattened state."""
        return obs["state"].flatten(1)

    def forward(self, obs: Obs, action: Tensor) -> Tensor:
        x = torch.cat((self.features(obs), action[:, : self.action_steps].flatten(1)), dim=-1)
        return torch.cat([network(x) for network in self.children()], dim=-1).t()
