"""Calibrated conservative Q-learning (Cal-QL; Nakamoto et al. 2023, arXiv 2303.05479): SAC whose critics, first on
demonstrations alone, learn to doubt actions that nobody tried, but not below what was really achieved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dppo_fast.algorithms.off_policy import values
from dppo_fast.algorithms.parts import Parts
from dppo_fast.algorithms.sac import MaxEntropy, MaxEntropyConfig
from dppo_fast.kernels.gae import gae
from dppo_fast.optim import LRConfig
from dppo_fast.replay import Transitions
from dppo_fast.types import Obs, require_ranges


@dataclass(frozen=True)
class CalQLConfig(MaxEntropyConfig):
    """The first ``n_offline_itr`` iterations collect nothing and take ``num_update`` gradient steps each on the
    demonstrations; later ones take ``online_utd_ratio`` for each collected transition, on as many of these as
    demonstrations.

    The target is the best of ``cql_n_actions`` of the policy's. ``cql_min_q_weight`` weighs the conservative term,
    whose gaps are clamped to [``cql_clip_diff_min``, ``cql_clip_diff_max``]; for it, ``n_random_actions`` are drawn.
    """

    actor_lr: float = 1e-4
    actor_lr_scheduler: LRConfig = field(default_factory=lambda: LRConfig(min_lr=1e-4))
    critic_lr: float = 3e-4
    critic_lr_scheduler: LRConfig = field(default_factory=lambda: LRConfig(min_lr=3e-4))
    backup_entropy: bool = False
    n_offline_itr: int = 100
    num_update: int = 1000
    online_utd_ratio: float = 1.0
    cql_n_actions: int = 10
    n_random_actions: int = 4
    cql_min_q_weight: float = 5.0
    cql_clip_diff_min: float = -math.inf
    cql_clip_diff_max: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "batch_size": "[2, inf)",
            "n_offline_itr": "[0, inf)",
            "num_update": "[1, inf)",
            "online_utd_ratio": "(0, inf)",
            "cql_n_actions": "[1, inf)",
            "n_random_actions": "[1, inf)",
            "cql_min_q_weight": "[0, inf)",
            "cql_clip_diff_min": f"[-inf, {self.cql_clip_diff_max}]",
        }
        require_ranges(self, "algorithm", ranges)


class CalQL(MaxEntropy):
    """A decision's reward-to-go is known once its episode is over. Until then ``record["reward_to_go"]`` is what came
    so far, ``record["discount"]`` what the next reward will count, and ``record["env"]`` where it will come from; in
    the end the discount is 0.
    """

    config: CalQLConfig
    keep = ("reward_to_go", "discount", "env")

    def __init__(self, config: CalQLConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.add_offline(parts, config.gamma)
        demonstrated = self.replays["offline"].data
        demonstrated["record/discount"] = torch.zeros_like(demonstrated["record/reward_to_go"])

    @property
    def steps_per_decision(self) -> float:
        return self.config.online_utd_ratio

    def steps_to_collect(self, iteration: int) -> int:
        return 0 if iteration < self.config.n_offline_itr else super().steps_to_collect(iteration)

    def steps(self, iteration: int) -> range:
        offline = self.config.n_offline_itr
        return range(self.config.num_update) if iteration < offline else super().steps(iteration - offline)

    def sources(self, iteration: int) -> dict[str, int]:
        if iteration < self.config.n_offline_itr:
            return {"offline": self.config.batch_size}
        return super().sources(iteration)

    def store(self) -> None:
        """Also catch up with the rewards-to-go of earlier decisions whose episodes went on."""
        buffer, gamma = self.buffer, self.config.gamma
        zero, env = torch.zeros_like(buffer.reward), torch.arange(buffer.num_envs, device=self.device)
        ends = buffer.terminated | buffer.truncated, torch.zeros_like(buffer.truncated)
        earned, _ = gae(buffer.reward, zero, zero, zero[0], *ends, gamma, 1.0)
        discount, _ = gae(zero, zero, zero, torch.ones_like(zero[0]), *ends, gamma, 1.0)
        if len(self.replay):
            goes_on = 1 - buffer.first[0].float()  # [N]
            old = {name: self.replay.data[f"record/{name}"][: len(self.replay)] for name in self.keep}
            self.replay.amend(
                "record/reward_to_go", old["reward_to_go"] + old["discount"] * (goes_on * earned[0])[old["env"]]
            )
            self.replay.amend("record/discount", old["discount"] * (goes_on * discount[0])[old["env"]])
        buffer.record |= {"reward_to_go": earned, "discount": discount, "env": env.expand_as(zero)}
        super().store()

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        shape = (self.config.batch_size, *self.chunk)
        uniform = torch.rand((self.config.n_random_actions, *shape), generator=self.generator, device=self.device)
        return {
            **super().draws(due),
            "next_noise": self.randn(self.config.cql_n_actions, *shape),
            "uniform": 2 * uniform - 1,
            "proposal_noise": self.randn(2, *shape),
        }

    def next_value(self, obs: Obs, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """[n, B]"""
        return values(self.target, obs, action).amin(0)

    def soft_value(self, obs: Obs, draws: Mapping[str, Tensor]) -> Tensor:
        """[B], of the best of n actions."""
        return super().soft_value(obs, draws).amax(0)

    def critic_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """SAC's, and the critics' mean gaps between ``soft_maximum`` and what was done, added up."""
        c = self.config
        q: Tensor = self.critic(batch.obs, batch.action)  # [Q, B]
        gap = (self.soft_maximum(batch, draws) - q).clamp(c.cql_clip_diff_min, c.cql_clip_diff_max)
        return self.value_loss(q, self.backup(batch, draws)) + c.cql_min_q_weight * gap.mean(-1).sum()

    def soft_maximum(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """log sum_i exp(Q(s, a_i)) / p(a_i) [Q, B] over actions from densities p: uniform ones, the policy's, and the
        policy's at the next state. The policy's are worth the reward-to-go at least.
        """
        actions, log_density = self.proposals(batch, draws)
        known = batch.record["discount"] == 0
        least = torch.where(known, self.config.scale_reward_factor * batch.record["reward_to_go"], -math.inf)
        q, uniform = values(self.critic, batch.obs, actions), self.config.n_random_actions  # [Q, P, B]
        q = torch.cat((q[:, :uniform], q[:, uniform:].maximum(least)), dim=1)
        return (q - log_density).logsumexp(1)

    @torch.no_grad()
    def proposals(self, batch: Transitions, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The actions of ``soft_maximum`` [P, B, Th, Da], and their log p [P, B]."""
        uniform, (noise, next_noise) = draws["uniform"], draws["proposal_noise"]
        log_uniform = uniform.new_full(uniform.shape[:2], -math.prod(self.chunk) * math.log(2))
        own, log_own = self.policy.sample_scored(batch.obs, noise[None])
        later, log_later = self.policy.sample_scored(batch.next_obs, next_noise[None])
        return torch.cat((uniform, own, later)), torch.cat((log_uniform, log_own, log_later))
