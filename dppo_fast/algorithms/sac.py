"""Soft actor-critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905), over action chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.off_policy import OffPolicy, OffPolicyConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.optim import LRConfig, Trainable
from dppo_fast.policies.squashed import SquashedGaussianPolicy
from dppo_fast.replay import Transitions
from dppo_fast.types import Obs, require_ranges


@dataclass(frozen=True)
class MaxEntropyConfig(OffPolicyConfig):
    """``target_entropy``: of a whole chunk, in nats; None is minus its number of elements. The temperature starts at
    ``init_temperature`` and learns at the critics' rate. ``backup_entropy`` counts the entropy of later decisions as
    reward.
    """

    actor_lr: float = 3e-4
    actor_lr_scheduler: LRConfig = field(default_factory=lambda: LRConfig(min_lr=3e-4))
    init_temperature: float = 1.0
    target_entropy: float | None = None
    backup_entropy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, "algorithm", {"init_temperature": "(0, inf)", "target_entropy": "(-inf, inf)"})


@dataclass(frozen=True)
class SACConfig(MaxEntropyConfig):
    """``critic_replay_ratio``: how often the critics learn from a transition, on average. The actor waits for
    critic_replay_ratio / actor_replay_ratio of their steps, and then takes as many at once.
    """

    critic_replay_ratio: float = 256
    actor_replay_ratio: float = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"critic_replay_ratio": "(0, inf)", "actor_replay_ratio": f"(0, {self.critic_replay_ratio}]"}
        require_ranges(self, "algorithm", ranges)


class Temperature(nn.Module):
    """alpha = exp(log_alpha), the price of one nat of entropy."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        return self.log_alpha.exp()


class MaxEntropy(OffPolicy):
    """What SAC and its heirs share: the squashed Gaussian, the soft Bellman target and the temperature.

    An heir says which critics there are (``make_critic``) and what becomes of their values Q [Q, B].
    """

    trains = SquashedGaussianPolicy
    policy: SquashedGaussianPolicy
    config: MaxEntropyConfig

    def __init__(self, config: MaxEntropyConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.critic = self.add_critic("critic", self.make_critic(parts))
        self.target = self.add_target("target_critic", self.critic)
        self.temperature = Temperature(config.init_temperature).to(parts.device)
        self.networks["temperature"] = self.temperature
        self.trainables["temperature"] = Trainable(
            self.temperature.parameters(), config.critic_lr, config.critic_lr_scheduler
        )
        self.chunk = parts.policy.horizon_steps, parts.policy.action_dim
        self.target_entropy = -math.prod(self.chunk) if config.target_entropy is None else config.target_entropy

    def make_critic(self, parts: Parts) -> nn.Module:
        """Q(obs, action) -> [Q, B]."""
        return parts.action_value()

    def next_value(self, obs: Obs, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """[B], of what the target critics say: the smallest."""
        value: Tensor = self.target(obs, action).amin(0)
        return value

    def value_loss(self, q: Tensor, target: Tensor) -> Tensor:
        """Of values [Q, B] that should be ``target`` [B]: the critics' mean squared errors, added up."""
        return (q - target).square().mean(-1).sum()

    def actor_value(self, q: Tensor) -> Tensor:
        """[B], what the actor seeks: the smallest."""
        return q.amin(0)

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        shape, actor_steps = (self.config.batch_size, *self.chunk), due.count("actor")
        return {"next_noise": self.randn(*shape), "noise": self.randn(actor_steps, 2, *shape)}

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch, draws)
        self.descend("critic", critic_loss, stop)
        self.follow(self.target, self.critic, stop)
        metrics = {"loss/critic": critic_loss, "sac/temperature": self.temperature()}
        for noise, temperature_noise in draws["noise"]:
            actor_loss = self.actor_loss(batch.obs, noise)
            self.descend("actor", actor_loss, stop)
            temperature_loss, entropy = self.temperature_loss(batch.obs, temperature_noise)
            self.descend("temperature", temperature_loss, stop)
            metrics |= {"loss/actor": actor_loss, "loss/temperature": temperature_loss, "sac/entropy": entropy}
        return metrics

    def critic_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """Of the demonstrated or collected actions, against ``backup``."""
        q: Tensor = self.critic(batch.obs, batch.action)
        return self.value_loss(q, self.backup(batch, draws))

    @torch.no_grad()
    def backup(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """[B]: y = r + gamma (1 - terminated) (Q'(s', a') - alpha log pi(a' | s')), a' ~ pi."""
        return batch.reward + self.config.gamma * (1 - batch.terminated) * self.soft_value(batch.next_obs, draws)

    def soft_value(self, obs: Obs, draws: Mapping[str, Tensor]) -> Tensor:
        """[B], of an action that the policy takes: its value, and the entropy's price if that counts."""
        action, log_prob = self.policy.sample_scored(obs, draws["next_noise"])
        value = self.next_value(obs, action, draws)
        return value - self.temperature() * log_prob if self.config.backup_entropy else value

    def actor_loss(self, obs: Obs, noise: Tensor) -> Tensor:
        """The mean of alpha log pi(a | s) - Q(s, a), a ~ pi."""
        action, log_prob = self.policy.sample_scored(obs, noise)
        value = self.actor_value(self.critic(obs, action))
        loss: Tensor = (self.temperature().detach() * log_prob - value).mean()
        return loss

    def temperature_loss(self, obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """alpha (entropy - target_entropy), and the policy's entropy, estimated by -log pi(a | s)."""
        with torch.no_grad():
            entropy = -self.policy.sample_scored(obs, noise)[1].mean()
        return self.temperature() * (entropy - self.target_entropy), entropy


class SAC(MaxEntropy):
    """SAC with the critics that the configuration describes, by default two."""

    config: SACConfig

    @property
    def steps_per_decision(self) -> float:
        return self.config.critic_replay_ratio / self.config.batch_size

    def actor_steps(self, step: int) -> int:
        delay = round(self.config.critic_replay_ratio / self.config.actor_replay_ratio)
        return delay if (step + 1) % delay == 0 else 0
