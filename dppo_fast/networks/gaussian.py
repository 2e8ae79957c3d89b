"""What all networks of Gaussian policies share: how wide the Gaussians are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dppo_fast.types import Obs, UserError, require_ranges


class GaussianNetwork(nn.Module):
    """A network whose output is one diagonal Gaussian over the action chunk, or ``num_modes`` of them.

    Their std is ``fixed_std``; or one learned value per mode and action dimension, which starts there
    (``learn_fixed_std``); or, with ``fixed_std=None``, an output of the network. What is learned is the log-variance,
    clamped so that the std lies in [std_min, std_max].
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        fixed_std: float | None,
        learn_fixed_std: bool,
        std_min: float,
        std_max: float,
        num_modes: int = 1,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.horizon_steps = horizon_steps
        self.num_modes = num_modes
        self.fixed_std = fixed_std
        self.learn_fixed_std = learn_fixed_std
        self.std_min, self.std_max = std_min, std_max
        ranges = {"fixed_std": "(0, inf)", "std_max": "(0, inf)", "std_min": f"(0, {std_max}]", "num_modes": "[1, inf)"}
        require_ranges(self, "", ranges)
        if learn_fixed_std:
            if fixed_std is None:
                raise UserError("learn_fixed_std=true needs fixed_std, the value to start from")
            self.logvar = nn.Parameter(torch.full((num_modes * action_dim,), 2 * math.log(fixed_std)))
        self.logvar_min = nn.Parameter(torch.tensor(2 * math.log(std_min)), requires_grad=False)
        self.logvar_max = nn.Parameter(torch.tensor(2 * math.log(std_max)), requires_grad=False)

    def features(self, obs: Obs) -> Tensor:
        """What the network sees of the observation: the flattened state."""
        return obs["state"].flatten(1)

    def std(self, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
        """For means [B, Th * Da] or [B, M, Th * Da], and what the network puts out for it, if it does."""
        if self.fixed_std is not None and not self.learn_fixed_std:
            return torch.full_like(mean, self.fixed_std)
        if logvar is None:
            logvar = self.logvar.view(self.num_modes, self.action_dim).repeat(1, self.horizon_steps).expand_as(mean)
        return (0.5 * logvar.clamp(self.logvar_min, self.logvar_max)).exp()
