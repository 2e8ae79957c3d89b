"""A Gaussian squashed into [-1, 1] by tanh, for maximum-entropy algorithms (Haarnoja et al. 2018, appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_fast.kernels.denoise_step import gaussian_log_density
from dppo_fast.policies.gaussian import Draw, GaussianPolicy
from dppo_fast.types import Obs, UserError

SLOPE_FLOOR = 1e-6
"""Added to tanh' = 1 - tanh^2, which is 0 in float32 where tanh rounds to 1."""


class SquashedGaussianPolicy(GaussianPolicy):
    """action = tanh(x) with x ~ N(mean, std); deterministic actions are tanh(mean)."""

    def sample(self, density: tuple[Tensor, Tensor], draw: Draw, deterministic: bool = False) -> Tensor:
        return super().sample(density, draw, deterministic).tanh()

    def sample_scored(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions made of the standard normals ``noise`` [B, Th, Da], and the log-density [B] of the whole chunk; both
        are differentiable. With noise [n, B, Th, Da], n for every observation, and the log-density is [n, B].
        """
        mean, std = self.actor_ft(obs)
        x = mean + std * self._bounded(noise.flatten(-2))
        action = x.tanh()
        log_prob = (gaussian_log_density(x, mean, std) - _log_slope(action)).sum(-1)
        return action.view_as(noise), log_prob

    def log_density(self, density: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        x = action.clamp(SLOPE_FLOOR - 1, 1 - SLOPE_FLOOR).atanh()
        return (gaussian_log_density(x, *density) - _log_slope(action)).mean(-1)

    def mean_entropy(self, density: tuple[Tensor, Tensor]) -> Tensor:
        raise UserError("algorithm.ent_coef: the entropy of a squashed Gaussian has no closed form; use 0")


def _log_slope(action: Tensor) -> Tensor:
    """log |d tanh(x) / dx|, by its value."""
    return torch.log(1 - action.square() + SLOPE_FLOOR)
