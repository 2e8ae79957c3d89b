"""Diffusion policy with action gradients (DIPO; Yang et al. 2023, arXiv 2305.13122): the critic improves the actions
in the replay buffer, and the policy imitates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.diffusion_q import DiffusionQ, DiffusionQConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.replay import Transitions
from dppo_fast.types import Act, Obs, require_ranges

ADAM_EPS = 1e-5
"""Of the ascent, whose gradients are small."""

GRAD_NORM_PER_ELEMENT = 0.1
"""The bound of a batch's gradient norm, divided by the number of executed elements of one chunk."""


@dataclass(frozen=True)
class DIPOConfig(DiffusionQConfig):
    """Each time an action is imitated, it first takes ``action_gradient_steps`` steps of Adam at rate ``action_lr``."""

    replay_ratio: float = 64
    action_lr: float = 1e-4
    action_gradient_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, "algorithm", {"action_lr": "(0, inf)", "action_gradient_steps": "[1, inf)"})


class DIPO(DiffusionQ):
    """``target_policy``, the policy's average over time, acts and says which actions come next.

    The replay buffer has each action twice: as it was taken, for the critics, and as it has been improved, for the
    policy. The reference has only the second, and credits it with the first one's reward.
    """

    config: DIPOConfig
    deployed = "target_policy"
    keep = ("action",)

    def __init__(self, config: DIPOConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.target_policy = self.add_target("target_policy", self.policy)
        self.imitated = "action" if parts.reference else "record/action"
        self.max_action_grad_norm = GRAD_NORM_PER_ELEMENT * parts.act_steps * parts.policy.action_dim

    def decide(self, obs: Obs, deterministic: bool) -> Act:
        self.target_policy.noise = self.policy.noise
        return self.target_policy.act(obs, deterministic)

    def next_value(self, obs: Obs, draws: Mapping[str, Tensor]) -> Tensor:
        return self.target_value(obs, self.target_policy.sample(obs, draws["next_noise"]).action)

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        metrics = super().minibatch(batch, draws, ("critic",), stop)
        if "actor" in due:
            before = dict(batch.items())[self.imitated]
            action = self.improve(batch.obs, before)
            self.replay.rewrite(self.imitated, draws["rows/replay"], torch.where(stop > 0, before, action))
            actor_loss = self.actor_loss(batch._replace(action=action), draws)
            self.descend("actor", actor_loss, stop)
            change = (action - before).square().mean().sqrt()
            metrics |= {"loss/actor": actor_loss, "dipo/action_change": change}
        self.follow(self.target_policy, self.policy, stop)
        return metrics

    def improve(self, obs: Obs, action: Tensor) -> Tensor:
        """``action`` [B, Th, Da] after its steps up the smallest Q, each of which ends inside [-1, 1]."""
        c = self.config
        action = nn.Parameter(action.clone())
        adam = torch.optim.Adam([action], c.action_lr, eps=ADAM_EPS, fused=True, capturable=action.is_cuda)
        for _ in range(c.action_gradient_steps):
            adam.zero_grad()
            loss = -self.critic(obs, action).amin(0).sum()
            loss.backward(inputs=[action])
            nn.utils.clip_grad_norm_([action], self.max_action_grad_norm, foreach=True)
            adam.step()
            action.data.clamp_(-1, 1)
        return action.detach()
