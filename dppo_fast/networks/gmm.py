"""The network of a Gaussian mixture policy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dppo_fast.networks.gaussian import GaussianNetwork
from dppo_fast.networks.mlp import MLP, ResidualMLP, trunk
from dppo_fast.types import Obs


class GMMMLP(GaussianNetwork):
    """obs -> (mean [B, M, Th * Da], std [B, M, Th * Da], logits [B, M]) of a mixture of M = ``num_modes`` Gaussians
    over the action chunk.

    Means (squashed to [-1, 1]), logits, and with ``fixed_std=None`` log-variances, come from an MLP each.
    ``visual_dim`` is what a subclass's ``features`` adds.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        num_modes: int = 5,
        activation_type: str = "Mish",
        residual_style: bool = False,
        use_layernorm: bool = False,
        fixed_std: float | None = None,
        learn_fixed_std: bool = False,
        std_min: float = 0.01,
        std_max: float = 1.0,
        *,
        visual_dim: int = 0,
    ) -> None:
        super().__init__(action_dim, horizon_steps, fixed_std, learn_fixed_std, std_min, std_max, num_modes)

        def mlp(outputs: int) -> MLP | ResidualMLP:
            dims = [visual_dim + cond_dim, *mlp_dims, outputs]
            return trunk(dims, activation_type, use_layernorm=use_layernorm, residual_style=residual_style)

        self.mlp_mean = mlp(num_modes * horizon_steps * action_dim)
        if fixed_std is None:
            self.mlp_logvar = mlp(num_modes * horizon_steps * action_dim)
        self.mlp_weights = mlp(num_modes)

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(obs)
        mean = self.mlp_mean(features).tanh().unflatten(1, (self.num_modes, -1))
        logvar = None if self.fixed_std is not None else self.mlp_logvar(features).view_as(mean)
        return mean, self.std(mean, logvar), self.mlp_weights(features)
