"""Advantage-weighted regression (AWR; Peng et al. 2019, arXiv 1910.00177), for diffusion policies and those with a
density.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dppo_fast.advantage import evaluate_critic
from dppo_fast.algorithms.off_policy import OffPolicy, OffPolicyConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.algorithms.weighted import exponential_weights, require_whole_chain, weighted_loss
from dppo_fast.kernels.gae import gae
from dppo_fast.replay import Transitions
from dppo_fast.types import require_ranges

STD_FLOOR = 1e-6
"""Added to the advantages' std, which may be 0."""


@dataclass(frozen=True)
class AWRConfig(OffPolicyConfig):
    """``buffer_size`` counts steps, each of all envs.

    ``replay_ratio``: how often the actor learns from a decision in the iteration that collects it, were it to learn
    from no other; the critic takes one step for ``critic_update_ratio`` of the actor's. It is moved ``td_alpha`` of the
    way to TD(``td_lambda``) returns. Weights are exp(``beta`` z), at most ``max_adv_weight``, of a minibatch's
    standardised advantages z.
    """

    batch_size: int = 1000
    buffer_size: int = 5000
    beta: float = 10.0
    max_adv_weight: float = 100.0
    replay_ratio: float = 64
    critic_update_ratio: int = 4
    td_lambda: float = 0.95
    td_alpha: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "batch_size": "[2, inf)",
            "beta": "[0, inf)",
            "max_adv_weight": "(0, inf)",
            "replay_ratio": "(0, inf)",
            "critic_update_ratio": "[1, inf)",
            "td_lambda": "[0, 1]",
            "td_alpha": "(0, 1]",
        }
        require_ranges(self, "algorithm", ranges)


class AWR(OffPolicy):
    """Values all decisions in the buffer by TD(lambda), fits the critic, values them again, and imitates them.

    The buffer keeps whole steps of all envs, [S, N] in the order of time; those that must not be learned from have a
    weight of 0.
    """

    config: AWRConfig

    def __init__(self, config: AWRConfig, parts: Parts) -> None:
        require_whole_chain(parts.policy)
        super().__init__(replace(config, buffer_size=config.buffer_size * parts.num_envs), parts)
        self.critic = self.add_critic("critic", parts.value())
        self.target, self.advantage = torch.zeros(2, self.replay.capacity, device=parts.device)

    @property
    def steps_per_decision(self) -> float:
        return self.config.replay_ratio / self.config.batch_size

    def store(self) -> None:
        rollout = self.buffer
        cut = rollout.truncated.clone()
        cut[-1].fill_(True)
        kept = Transitions.collected(rollout)._replace(record={"cut": cut, "valid": rollout.valid.float()})
        self.replay.add(kept.map(lambda value: value.flatten(0, 1)))

    def plan(self, iteration: int) -> Iterator[tuple[str, ...]]:
        """First the critic's steps, then the actor's, each by what the critic made of the buffer before."""
        steps, c = self.steps(iteration), self.config
        self.estimate()
        yield from [("critic",)] * sum(step % c.critic_update_ratio == 0 for step in steps)
        if iteration >= c.n_critic_warmup_itr:
            self.estimate()
            yield from [("actor",)] * len(steps)

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        return self.policy.cloning_draws(self.config.batch_size) if "actor" in due else {}

    @torch.no_grad()
    def estimate(self) -> None:
        """Fill in ``advantage`` and ``target``, the value that the critic should have, of all rows."""
        c, replay = self.config, self.replay
        rows = (replay.head - len(replay) + torch.arange(len(replay), device=self.device)) % replay.capacity
        data = replay.gather(rows)
        shape = -1, self.buffer.num_envs
        value, next_value = (evaluate_critic(self.critic, obs).view(shape) for obs in (data.obs, data.next_obs))
        advantage, _ = gae(
            data.reward.view(shape) * c.scale_reward_factor,
            value,
            next_value,
            next_value[-1],
            data.terminated.view(shape) > 0,
            data.record["cut"].view(shape),
            c.gamma,
            c.td_lambda,
        )
        self.advantage[rows] = advantage.flatten()
        self.target[rows] = (value + c.td_alpha * advantage).flatten()

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        (name,), rows = due, draws["rows/replay"]
        if name == "critic":
            loss = self.critic_loss(batch, self.target[rows])
        else:
            loss = self.actor_loss(batch, self.advantage[rows], draws)
        self.descend(name, loss, stop)
        return {f"loss/{name}": loss}

    def critic_loss(self, batch: Transitions, target: Tensor) -> Tensor:
        """The mean squared error against ``target`` [B]."""
        loss: Tensor = (batch.record["valid"] * (self.critic(batch.obs) - target).square()).mean()
        return loss

    def actor_loss(self, batch: Transitions, advantage: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The policy's weighted loss with ``advantage`` [B]."""
        weight = self.weights(advantage) * batch.record["valid"]
        return weighted_loss(self.policy, batch.obs, batch.action, weight, draws)

    def weights(self, advantage: Tensor) -> Tensor:
        """[B]."""
        z = (advantage - advantage.mean()) / (advantage.std() + STD_FLOOR)
        return exponential_weights(z, self.config.beta, self.config.max_adv_weight)
