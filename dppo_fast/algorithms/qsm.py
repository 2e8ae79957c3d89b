"""Q-score matching (QSM; Psenka et al. 2023, arXiv 2312.11752): the policy's score learns to be the action gradient of
the critics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_fast.algorithms.diffusion_q import DiffusionQ, DiffusionQConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.replay import Transitions
from dppo_fast.types import Obs, UserError, require_ranges


@dataclass(frozen=True)
class QSMConfig(DiffusionQConfig):
    """``q_grad_coeff``: the score per unit of the action gradient; the larger, the greedier is the policy."""

    q_grad_coeff: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, "algorithm", {"q_grad_coeff": "(0, inf)"})


class QSM(DiffusionQ):
    """The network's output is the score, turned round: the noise that it predicts points away from likely actions."""

    config: QSMConfig

    def __init__(self, config: QSMConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        if not self.policy.config.predict_epsilon:
            raise UserError("policy.options.predict_epsilon=false: this algorithm trains the predicted noise; use true")

    def actor_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """The mean of (eps(x, t, s) + q_grad_coeff grad_x Q(s, x))^2, x being the actions with the noise of t."""
        x = self.policy.schedule.add_noise(batch.action, draws["t"], draws["noise"])
        score = self.config.q_grad_coeff * self.action_gradient(batch.obs, x)
        loss: Tensor = (self.policy.actor(x, draws["t"], batch.obs) + score).square().mean()
        return loss

    def action_gradient(self, obs: Obs, action: Tensor) -> Tensor:
        """Of Q(s, a), the mean over the critics: [B, Th, Da]."""
        action = action.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(obs, action).mean(0).sum(), action)
        return gradient
