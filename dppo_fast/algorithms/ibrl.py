"""Imitation-bootstrapped reinforcement learning (IBRL; Hu et al. 2024, arXiv 2311.02198): a frozen imitation policy and
a learning one both propose, and critics choose, when acting and in their own targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.off_policy import OffPolicy, OffPolicyConfig, demonstrations, values
from dppo_fast.algorithms.parts import Parts
from dppo_fast.networks.ensemble import Ensemble
from dppo_fast.policies.gaussian import GaussianPolicy
from dppo_fast.replay import Transitions
from dppo_fast.types import Act, Obs, UserError, require_ranges

JUDGES = 2
"""Members of the ensemble, drawn anew for every decision and every batch, whose minimum chooses."""


@dataclass(frozen=True)
class IBRLConfig(OffPolicyConfig):
    """After every ``update_freq`` collected transitions the critics take ``critic_num_update`` steps, the actor one.

    With ``soft_action_sample`` actions are chosen with a probability proportional to
    exp(``soft_action_sample_beta`` Q), otherwise the better one is; ``soft_bootstrap`` says the same of targets.
    """

    buffer_size: int = 300000
    target_ema_rate: float = 0.01
    n_critics: int = 5
    critic_num_update: int = 5
    update_freq: int = 2
    soft_action_sample: bool = True
    soft_action_sample_beta: float = 10.0
    soft_bootstrap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "n_critics": f"[{JUDGES}, inf)",
            "critic_num_update": "[1, inf)",
            "update_freq": "[1, inf)",
            "soft_action_sample_beta": "(0, inf)",
        }
        require_ranges(self, "algorithm", ranges)


class IBRL(OffPolicy):
    """The base network ``policy.actor`` is the imitation policy, whose mean it proposes. The demonstrations are the
    first that the replay buffer holds.
    """

    trains = GaussianPolicy
    policy: GaussianPolicy
    config: IBRLConfig
    judges = ("target_critic",)

    def __init__(self, config: IBRLConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.critic = self.add_critic(
            "critic", Ensemble([parts.action_value(double_q=False) for _ in range(config.n_critics)])
        )
        self.target = self.add_target("target_critic", self.critic)
        self.target_actor = self.add_target("target_actor", self.policy.trained())
        self.chunk = self.policy.horizon_steps, self.policy.action_dim

    @classmethod
    def build(cls, options: IBRLConfig, parts: Parts) -> Self:
        if not parts.pretrained:
            raise UserError("policy.checkpoint is missing: give the policy to imitate, as behaviour cloning trains it")
        algorithm = super().build(options, parts)
        algorithm.replay.add(demonstrations(parts))
        return algorithm

    @property
    def steps_per_decision(self) -> float:
        return self.config.critic_num_update / self.config.update_freq

    def actor_steps(self, step: int) -> int:
        return 1 if (step + 1) % self.config.critic_num_update == 0 else 0

    def imitate(self, obs: Obs) -> Tensor:
        """The imitation policy's proposals [B, Th, Da]."""
        return self.policy.sample(self.policy.actor(obs), self.randn, deterministic=True).view(-1, *self.chunk)

    def propose(self, network: nn.Module, obs: Obs, noise: Tensor) -> Tensor:
        """Those of ``network`` [B, Th, Da], made of ``noise`` [B, Th, Da]; differentiable."""
        return self.policy.sample(network(obs), lambda _: noise).view_as(noise)

    def chooses_own(self, q: Tensor, luck: Tensor | None) -> Tensor:
        """Whether not to imitate [B]; ``q`` [2, B] values imitation and the own proposal. Uniform ``luck`` [B] in
        [0, 1) makes the choice a soft one.
        """
        gain = q[1] - q[0]
        return gain >= 0 if luck is None else luck < torch.sigmoid(self.config.soft_action_sample_beta * gain)

    @torch.no_grad()
    def decide(self, obs: Obs, deterministic: bool) -> Act:
        """Deterministic decisions are the better of both means, by the smallest value that any critic gives."""
        proposals = torch.stack((self.imitate(obs), self.policy.act(obs, deterministic).action))
        q, luck = values(self.target, obs, proposals).squeeze(1), None  # [n_critics, 2, B]
        if not deterministic:
            batch, n_critics = len(obs["state"]), self.config.n_critics
            noise = self.policy.draw_noise(batch, math.ceil((n_critics + 1) / math.prod(self.chunk)))
            noise = noise.transpose(0, 1).flatten(1)  # [B, >= n_critics + 1]
            judges = noise[:, :n_critics].argsort(1)[:, :JUDGES].t()  # [JUDGES, B]
            q = q.gather(0, judges[:, None].expand(-1, 2, -1))
            if self.config.soft_action_sample:
                luck = torch.special.ndtr(noise[:, n_critics])
        imitated, own = proposals
        action = torch.where(self.chooses_own(q.amin(0), luck)[:, None, None], own, imitated)
        return Act(action, {} if deterministic else {"action": action})

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        size = self.config.batch_size
        order = torch.randperm(self.config.n_critics, generator=self.generator, device=self.device)
        draws = {"judges": order[:JUDGES], "next_noise": self.randn(size, *self.chunk)}
        if self.config.soft_bootstrap:
            draws["luck"] = torch.rand(size, generator=self.generator, device=self.device)
        if "actor" in due:
            draws["noise"] = self.randn(size, *self.chunk)
        return draws

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch, draws)
        self.descend("critic", critic_loss, stop)
        self.follow(self.target, self.critic, stop)
        metrics = {"loss/critic": critic_loss}
        if "actor" in due:
            actor_loss = self.actor_loss(batch.obs, draws["noise"])
            self.descend("actor", actor_loss, stop)
            self.follow(self.target_actor, self.policy.trained(), stop)
            metrics["loss/actor"] = actor_loss
        return metrics

    def critic_loss(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error against y = r + gamma (1 - terminated) Q'(s', a'), a' the chosen proposal."""
        with torch.no_grad():
            own = self.propose(self.target_actor, batch.next_obs, draws["next_noise"])
            proposals = torch.stack((self.imitate(batch.next_obs), own))
            q = values(partial(self.target, members=draws["judges"]), batch.next_obs, proposals).amin((0, 1))
            value = torch.where(self.chooses_own(q, draws.get("luck")), q[1], q[0])
            target = batch.reward + self.config.gamma * (1 - batch.terminated) * value
        loss: Tensor = (self.critic(batch.obs, batch.action) - target).square().mean()
        return loss

    def actor_loss(self, obs: Obs, noise: Tensor) -> Tensor:
        """Minus the mean of the smallest value that any critic gives to the own proposals, which the paper makes with
        dropout.
        """
        with self.policy.dropout() as network:
            value = self.critic(obs, self.propose(network, obs, noise))
        loss: Tensor = -value.amin((0, 1)).mean()
        return loss
