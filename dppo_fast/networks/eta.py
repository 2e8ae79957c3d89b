"""DDIM's eta, the share of DDPM's noise that a sampling step adds, as a constant or a learned function.

All are bounded to [min_eta, max_eta], in which base_eta, the value to start from, has to lie. ``eta(obs)`` is [B, 1] or
[B, Da] (Song et al. 2021, eq. 16; Ren et al. 2024).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dppo_fast.networks.mlp import MLP
from dppo_fast.types import Obs, UserError


def _require_bounds(base_eta: float, min_eta: float, max_eta: float) -> None:
    if not min_eta <= base_eta <= max_eta or min_eta == max_eta:
        raise UserError(
            f"base_eta={base_eta} must lie in [min_eta, max_eta] = [{min_eta}, {max_eta}], min_eta < max_eta"
        )


class Eta(nn.Module):
    """``constant`` is a number where eta does not depend on anything learned, else None."""

    constant: float | None = None

    @abstractmethod
    def forward(self, obs: Obs) -> Tensor: ...


class _EtaLogit(Eta):
    """0.5 (tanh(logit) + 1) (max - min) + min, one logit per output. Where base_eta is a bound, the logit is infinite
    and has no gradient.
    """

    def __init__(self, outputs: int, base_eta: float, min_eta: float, max_eta: float) -> None:
        super().__init__()
        _require_bounds(base_eta, min_eta, max_eta)
        self.min_eta, self.max_eta = float(min_eta), float(max_eta)
        normalized = 2 * (base_eta - min_eta) / (max_eta - min_eta) - 1
        self.eta_logit = nn.Parameter(torch.atanh(torch.full((outputs,), float(normalized))))

    def forward(self, obs: Obs) -> Tensor:
        eta = 0.5 * (self.eta_logit.tanh() + 1) * (self.max_eta - self.min_eta) + self.min_eta
        return eta.expand(len(obs["state"]), -1)


class EtaFixed(_EtaLogit):
    """One number for all states and actions: [B, 1]; constant unless the policy learns eta."""

    def __init__(self, base_eta: float = 0.5, min_eta: float = 0.1, max_eta: float = 1.0) -> None:
        super().__init__(1, base_eta, min_eta, max_eta)
        self.constant = float(base_eta)


class EtaAction(_EtaLogit):
    """One number per action dimension: [B, Da]."""

    def __init__(self, action_dim: int, base_eta: float = 0.5, min_eta: float = 0.001, max_eta: float = 2.0) -> None:
        super().__init__(action_dim, base_eta, min_eta, max_eta)


class _EtaMLP(Eta):
    """clamp(tanh(mlp(state)) + base, min, max)."""

    def __init__(
        self,
        outputs: int,
        input_dim: int,
        mlp_dims: Sequence[int],
        activation_type: str,
        base_eta: float,
        min_eta: float,
        max_eta: float,
        gain: float,
    ) -> None:
        super().__init__()
        _require_bounds(base_eta, min_eta, max_eta)
        self.base_eta, self.min_eta, self.max_eta = base_eta, min_eta, max_eta
        self.mlp_res = MLP([input_dim, *mlp_dims, outputs], activation_type)
        for module in self.mlp_res.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, gain=gain)
                nn.init.zeros_(module.bias)

    def forward(self, obs: Obs) -> Tensor:
        residual: Tensor = self.mlp_res(obs["state"].flatten(1)).tanh()
        return (residual + self.base_eta).clamp(self.min_eta, self.max_eta)


class EtaState(_EtaMLP):
    """One number per state: [B, 1]."""

    def __init__(
        self,
        input_dim: int,
        mlp_dims: Sequence[int],
        activation_type: str = "ReLU",
        base_eta: float = 0.5,
        min_eta: float = 0.001,
        max_eta: float = 2.0,
        gain: float = 1e-2,
    ) -> None:
        super().__init__(1, input_dim, mlp_dims, activation_type, base_eta, min_eta, max_eta, gain)


class EtaStateAction(_EtaMLP):
    """One number per state and action dimension: [B, Da]."""

    def __init__(
        self,
        input_dim: int,
        action_dim: int,
        mlp_dims: Sequence[int],
        activation_type: str = "ReLU",
        base_eta: float = 1.0,
        min_eta: float = 1e-3,
        max_eta: float = 2.0,
        gain: float = 1e-2,
    ) -> None:
        super().__init__(action_dim, input_dim, mlp_dims, activation_type, base_eta, min_eta, max_eta, gain)
