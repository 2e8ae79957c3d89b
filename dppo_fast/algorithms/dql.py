"""Diffusion Q-learning (DQL; Wang et al. 2023, arXiv 2208.06193): the policy imitates what is in the replay buffer and
seeks value, whose gradient runs back through the whole chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_fast.algorithms.diffusion_q import DiffusionQ, DiffusionQConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.replay import Transitions
from dppo_fast.types import require_ranges


@dataclass(frozen=True)
class DQLConfig(DiffusionQConfig):
    """``eta``: the weight of the value against that of the imitation."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, "algorithm", {"eta": "[0, inf)"})


class DQL(DiffusionQ):
    """``imitate_itself`` is the reference's way: the policy imitates its own samples instead of the buffer's actions,
    and the gradient of this, too, runs back through the chain.
    """

    config: DQLConfig

    def __init__(self, config: DQLConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.imitate_itself = parts.reference

    def actor_draws(self) -> dict[str, Tensor]:
        order = torch.randperm(2, generator=self.generator, device=self.device)
        return {**super().actor_draws(), "chain": self.chain_noise(), "critics": order}

    def actor_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """The denoising loss minus eta mean Q_i(s, a) / mean |Q_j(s, a)|, a ~ pi; ``draws["critics"]`` is (i, j)."""
        action = self.policy.rsample(batch.obs, draws["chain"])
        sought, scale = self.critic(batch.obs, action)[draws["critics"]]
        imitated = batch._replace(action=action) if self.imitate_itself else batch
        value: Tensor = sought.mean() / scale.detach().abs().mean()
        return super().actor_loss(imitated, draws) - self.config.eta * value
