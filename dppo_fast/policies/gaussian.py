"""The diagonal Gaussian policy over action chunks."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dppo_fast.kernels.denoise_step import LOG_PROB_RANGE, gaussian_log_density
from dppo_fast.policies.base import Policy
from dppo_fast.types import Act, Obs, Record, require_ranges


@dataclass(frozen=True)
class GaussianConfig:
    """``randn_clip_value`` bounds the draws, so actions stay within that many standard deviations of the mean."""

    randn_clip_value: float = 10.0

    def __post_init__(self) -> None:
        require_ranges(self, "policy.options", {"randn_clip_value": "(0, inf)"})


class GaussianPolicy(Policy):
    """``actor_ft`` is trained; ``actor``, its frozen copy, is the base policy of the behaviour-cloning term.

    A log-prob is the mean over the chunk's Th * Da elements. ``record``: ``action`` [N, Th, Da], ``log_prob`` [N, 1].
    """

    def __init__(self, network: nn.Module, config: GaussianConfig, horizon_steps: int, action_dim: int) -> None:
        super().__init__()
        self.config = config
        self.horizon_steps = horizon_steps
        self.action_dim = action_dim
        self.actor_ft = network
        self.actor = copy.deepcopy(network).requires_grad_(False)

    @property
    def decisions(self) -> int:
        return 1

    @torch.no_grad()
    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        mean, std = self.actor_ft(obs)
        if deterministic:
            return Act(self._chunk(mean), {})
        action = self._sample(mean, std, self.draw_noise(len(mean), 1).view_as(mean))
        log_prob = gaussian_log_density(action, mean, std).mean(-1, keepdim=True)
        return Act(self._chunk(action), {"action": self._chunk(action), "log_prob": log_prob})

    def select(self, record: Record, row: Tensor, k: Tensor) -> Record:
        return {"action": record["action"][row]}

    def log_prob(self, obs: Obs, part: Record, k: Tensor) -> Tensor:
        mean, std = self.actor_ft(obs)
        return gaussian_log_density(part["action"].flatten(1), mean, std).mean(-1)

    def entropy(self, obs: Obs) -> Tensor:
        """Differential entropy per element, 0.5 log(2 pi e std^2), averaged over the batch."""
        _, std = self.actor_ft(obs)
        return (0.5 * torch.log(2 * torch.pi * torch.e * std.square())).mean()

    def behaviour_cloning_loss(self, obs: Obs) -> Tensor:
        with torch.no_grad():
            mean, std = self.actor(obs)
            action = self._sample(mean, std, self.randn(*mean.shape))
        mean, std = self.actor_ft(obs)
        return -gaussian_log_density(action, mean, std).clamp(*LOG_PROB_RANGE).mean()

    def cloning_loss(self, obs: Obs, action: Tensor) -> Tensor:
        """Minus the mean log-density of the demonstrated chunks."""
        mean, std = self.actor_ft(obs)
        return -gaussian_log_density(action.flatten(1), mean, std).mean()

    def _sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        bound = self.config.randn_clip_value
        return mean + std * noise.clamp(-bound, bound)

    def _chunk(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self.horizon_steps, self.action_dim)
