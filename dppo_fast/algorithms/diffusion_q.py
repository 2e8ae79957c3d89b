"""What the algorithms share that train all of a diffusion policy's denoising steps with the help of Q functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_fast.algorithms.off_policy import OffPolicy, OffPolicyConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.algorithms.weighted import require_whole_chain
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.replay import Transitions
from dppo_fast.types import Obs, require_ranges


@dataclass(frozen=True)
class DiffusionQConfig(OffPolicyConfig):
    """``replay_ratio``: how often a transition is learned from, on average."""

    replay_ratio: float = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, "algorithm", {"replay_ratio": "(0, inf)"})


class DiffusionQ(OffPolicy):
    """Two action values and their averages over time, ``target``; an actor that imitates what is in the replay buffer.

    An heir says what comes after a decision (``next_value``) or what else the actor seeks (``actor_loss``), and which
    random numbers that takes (``critic_draws``, ``actor_draws``).
    """

    trains = DiffusionPolicy
    policy: DiffusionPolicy
    config: DiffusionQConfig

    def __init__(self, config: DiffusionQConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        policy = self.policy
        require_whole_chain(policy)
        self.critic = self.add_critic("critic", parts.action_value(double_q=True))
        self.target = self.add_target("target_critic", self.critic)
        self.batch_shape = config.batch_size, policy.horizon_steps, policy.action_dim

    @property
    def steps_per_decision(self) -> float:
        return self.config.replay_ratio / self.config.batch_size

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        return {**self.critic_draws(), **(self.actor_draws() if "actor" in due else {})}

    def critic_draws(self) -> dict[str, Tensor]:
        """The random numbers of one ``critic_loss``."""
        return {"next_noise": self.chain_noise()}

    def actor_draws(self) -> dict[str, Tensor]:
        """The random numbers of one ``actor_loss``: timesteps ``t`` [B] among all K and ``noise`` [B, Th, Da]."""
        K = self.policy.schedule.denoising_steps
        t = torch.randint(K, self.batch_shape[:1], generator=self.generator, device=self.device)
        return {"t": t, "noise": self.randn(*self.batch_shape)}

    def chain_noise(self) -> Tensor:
        """What a batch of chains is made of: [S + 1, B, Th, Da]."""
        return self.randn(self.policy.schedule.steps + 1, *self.batch_shape)

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch, draws)
        self.descend("critic", critic_loss, stop)
        self.follow(self.target, self.critic, stop)
        metrics = {"loss/critic": critic_loss}
        if "actor" in due:
            actor_loss = self.actor_loss(batch, draws)
            self.descend("actor", actor_loss, stop)
            metrics["loss/actor"] = actor_loss
        return metrics

    def critic_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """Both critics' mean squared errors against y = r + gamma (1 - terminated) ``next_value``, added up."""
        with torch.no_grad():
            value = self.next_value(batch.next_obs, draws)
            target = batch.reward + self.config.gamma * (1 - batch.terminated) * value
        q: Tensor = self.critic(batch.obs, batch.action)
        return (q - target).square().mean(-1).sum()

    def next_value(self, obs: Obs, draws: Mapping[str, Tensor]) -> Tensor:
        """[B]: min_i Q'_i(s', a'), a' ~ pi."""
        return self.target_value(obs, self.policy.sample(obs, draws["next_noise"]).action)

    def target_value(self, obs: Obs, action: Tensor) -> Tensor:
        """[B]: min_i Q'_i(s, a) of the target critics."""
        value: Tensor = self.target(obs, action).amin(0)
        return value

    def actor_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """0-d; this one is the denoising loss."""
        return self.policy.denoising_loss(batch.obs, batch.action, draws["t"], draws["noise"])
