"""Policies whose network gives the density of the action chunk in closed form, and the diagonal Gaussian among them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dppo_fast.kernels.denoise_step import LOG_PROB_RANGE, gaussian_log_density
from dppo_fast.policies.base import Policy
from dppo_fast.types import Act, Obs, Record, require_ranges

Draw: TypeAlias = Callable[[int], Tensor]
"""Number of draws n -> standard normals [n, B, Th, Da]."""


@dataclass(frozen=True)
class GaussianConfig:
    """``randn_clip_value`` bounds the draws, so actions stay within that many standard deviations of the mean."""

    randn_clip_value: float = 10.0

    def __post_init__(self) -> None:
        require_ranges(self, "policy.options", {"randn_clip_value": "(0, inf)"})


class DensityPolicy(Policy):
    """``actor_ft`` is trained; ``actor``, its frozen copy, is the base policy of the behaviour-cloning term.

    ``record``: ``action`` [N, Th, Da], ``log_prob`` [N, 1]. ``clamp_log_prob`` reproduces the reference, which clamps
    log-probs to LOG_PROB_RANGE: chunks outside of it, such as nearly all that a narrow density samples, then have no
    gradient.
    """

    def __init__(
        self,
        network: nn.Module,
        config: GaussianConfig,
        horizon_steps: int,
        action_dim: int,
        clamp_log_prob: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.horizon_steps = horizon_steps
        self.action_dim = action_dim
        self.clamp_log_prob = clamp_log_prob
        self.actor_ft = network.eval()
        self.actor = copy.deepcopy(network).requires_grad_(False)

    @abstractmethod
    def sample(self, density: Any, draw: Draw, deterministic: bool = False) -> Tensor:
        """Chunks [B, Th * Da] from what the network put out."""

    @abstractmethod
    def log_density(self, density: Any, action: Tensor) -> Tensor:
        """What PPO and pre-training take for the log-prob [B] of chunks ``action`` [B, Th * Da]."""

    @abstractmethod
    def mean_entropy(self, density: Any) -> Tensor:
        """0-d."""

    @property
    def decisions(self) -> int:
        return 1

    @torch.no_grad()
    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        density = self.actor_ft(obs)
        action = self.sample(density, partial(self.draw_noise, len(obs["state"])), deterministic)
        chunk = action.view(-1, self.horizon_steps, self.action_dim)
        if deterministic:
            return Act(chunk, {})
        return Act(chunk, {"action": chunk, "log_prob": self._score(density, action)[:, None]})

    def select(self, record: Record, row: Tensor, k: Tensor) -> Record:
        return {"action": record["action"][row]}

    def log_prob(self, obs: Obs, part: Record, k: Tensor) -> Tensor:
        return self._score(self.actor_ft(obs), part["action"].flatten(1))

    def entropy(self, obs: Obs) -> Tensor:
        return self.mean_entropy(self.actor_ft(obs))

    def behaviour_cloning_loss(self, obs: Obs) -> Tensor:
        shape = len(obs["state"]), self.horizon_steps, self.action_dim
        with torch.no_grad():
            action = self.sample(self.actor(obs), lambda draws: self.randn(draws, *shape))
        return -self._score(self.actor_ft(obs), action).mean()

    def cloning_errors(self, obs: Obs, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Minus the log-densities, with dropout."""
        with self.dropout() as network:
            return -self.log_density(network(obs), action.flatten(1))

    def _score(self, density: Any, action: Tensor) -> Tensor:
        log_prob = self.log_density(density, action)
        return log_prob.clamp(*LOG_PROB_RANGE) if self.clamp_log_prob else log_prob

    def _bounded(self, noise: Tensor) -> Tensor:
        return noise.clamp(-self.config.randn_clip_value, self.config.randn_clip_value)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Elementwise differential entropy, 0.5 log(2 pi e std^2)."""
    return 0.5 * torch.log(2 * torch.pi * torch.e * std.square())


class GaussianPolicy(DensityPolicy):
    """A diagonal Gaussian. Log-prob and entropy are means over the chunk's Th * Da elements; deterministic actions are
    the mean.
    """

    def sample(self, density: tuple[Tensor, Tensor], draw: Draw, deterministic: bool = False) -> Tensor:
        mean, std = density
        return mean if deterministic else mean + std * self._bounded(draw(1).view_as(mean))

    def log_density(self, density: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        return gaussian_log_density(action, *density).mean(-1)

    def mean_entropy(self, density: tuple[Tensor, Tensor]) -> Tensor:
        return gaussian_entropy(density[1]).mean()
