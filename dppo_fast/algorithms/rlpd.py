"""Reinforcement learning with prior data (RLPD; Ball et al. 2023, arXiv 2302.02948): SAC with an ensemble of critics,
half of whose batches are demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.parts import Parts
from dppo_fast.algorithms.sac import MaxEntropy, MaxEntropyConfig
from dppo_fast.networks.ensemble import Ensemble
from dppo_fast.types import Obs, require_ranges

TARGET_CRITICS = 2
"""Members of the ensemble, drawn anew for every batch, whose minimum is the target."""


@dataclass(frozen=True)
class RLPDConfig(MaxEntropyConfig):
    """After every ``update_freq`` collected transitions the critics take ``critic_num_update`` steps, the actor one."""

    n_critics: int = 10
    critic_num_update: int = 20
    update_freq: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "n_critics": f"[{TARGET_CRITICS}, inf)",
            "critic_num_update": "[1, inf)",
            "update_freq": "[1, inf)",
            "batch_size": "[2, inf)",
        }
        require_ranges(self, "algorithm", ranges)


class RLPD(MaxEntropy):
    """The actor seeks the critics' mean."""

    config: RLPDConfig
    target: Ensemble

    def __init__(self, config: RLPDConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.add_offline(parts)

    def make_critic(self, parts: Parts) -> nn.Module:
        return Ensemble([parts.action_value(double_q=False) for _ in range(self.config.n_critics)])

    @property
    def steps_per_decision(self) -> float:
        return self.config.critic_num_update / self.config.update_freq

    def actor_steps(self, step: int) -> int:
        return 1 if (step + 1) % self.config.critic_num_update == 0 else 0

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        order = torch.randperm(self.config.n_critics, generator=self.generator, device=self.device)
        return {**super().draws(due), "members": order[:TARGET_CRITICS]}

    def next_value(self, obs: Obs, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        value: Tensor = self.target(obs, action, members=draws["members"]).amin((0, 1))
        return value

    def value_loss(self, q: Tensor, target: Tensor) -> Tensor:
        return (q - target).square().mean()

    def actor_value(self, q: Tensor) -> Tensor:
        return q.mean((0, 1))
