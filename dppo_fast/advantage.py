"""From a rollout and a critic to advantages and returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.gae import gae
from dppo_fast.types import Obs

CRITIC_BATCH = 16384
"""Rows per critic call, to bound memory."""

IMAGE_CRITIC_BATCH = 512
"""The same where there are images."""


class Estimates(NamedTuple):
    """Each [T, N] float32; ``value`` is the critic's before the update."""

    value: Tensor
    advantage: Tensor
    returns: Tensor


@torch.no_grad()
def evaluate_critic(critic: nn.Module, obs: Obs) -> Tensor:
    """V of a batch of observations [M, ...] -> [M], in pieces and without dropout."""
    size, learning = CRITIC_BATCH if obs.keys() == {"state"} else IMAGE_CRITIC_BATCH, critic.training
    critic.eval()
    pieces = [
        critic(dict(zip(obs, rows, strict=True)))
        for rows in zip(*(torch.split(value, size) for value in obs.values()), strict=True)
    ]
    critic.train(learning)
    return torch.cat(pieces)


def estimate_advantages(
    buffer: RolloutBuffer,
    critic: nn.Module,
    reward: Tensor,
    gamma: float,
    lam: float,
    bootstrap_truncated: bool = True,
) -> Estimates:
    """Generalised advantages (Schulman et al. 2016, eq. 16) of ``reward`` [T, N].

    A truncated episode bootstraps from the value of its own last observation. With ``bootstrap_truncated=False`` only
    termination cuts, and a truncated episode runs into the next one, as in the reference.
    """
    T, N = buffer.num_steps, buffer.num_envs
    value = evaluate_critic(critic, {name: obs.flatten(0, 1) for name, obs in buffer.obs.items()}).view(T, N)
    last_value = evaluate_critic(critic, buffer.last_obs)
    bootstrap = torch.zeros_like(value)
    if bootstrap_truncated and buffer.final:
        stacked = {name: torch.cat([obs[name] for _, obs in buffer.final]) for name in buffer.obs}
        for (t, _), final_value in zip(buffer.final, evaluate_critic(critic, stacked).view(-1, N), strict=True):
            bootstrap[t] = final_value
    truncated = buffer.truncated if bootstrap_truncated else torch.zeros_like(buffer.truncated)
    advantage, returns = gae(reward, value, bootstrap, last_value, buffer.terminated, truncated, gamma, lam)
    return Estimates(value, advantage, returns)


def normalize_advantage(advantage: Tensor, normalize: bool, lower_quantile: float, upper_quantile: float) -> Tensor:
    """Standardise over the minibatch (unbiased std, + 1e-8), then clip to two of its quantiles; 0 and 1 clip
    nothing.
    """
    if normalize:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    if lower_quantile > 0 or upper_quantile < 1:
        advantage = advantage.clamp(advantage.quantile(lower_quantile), advantage.quantile(upper_quantile))
    return advantage
