"""Weighted regression: a policy imitates what was done, the more the better it was."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dppo_fast.policies.base import Policy
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.types import Obs, UserError


def exponential_weights(score: Tensor, beta: float, largest: float) -> Tensor:
    """exp(beta score), and at most ``largest``."""
    return (beta * score).exp().clamp(max=largest)


def weighted_loss(policy: Policy, obs: Obs, action: Tensor, weight: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """The mean of the chunks' cloning errors times ``weight`` [B]; ``draws`` are the policy's ``cloning_draws``."""
    return (weight * policy.cloning_errors(obs, action, draws)).mean()


def require_whole_chain(policy: Policy) -> None:
    """Raise UserError for a diffusion policy of which only the last steps are trained."""
    if isinstance(policy, DiffusionPolicy) and policy.ft_steps:
        raise UserError(
            f"policy.options.ft_denoising_steps={policy.ft_steps}: this algorithm trains the whole chain; use 0"
        )
