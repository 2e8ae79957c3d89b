"""Implicit diffusion Q-learning (IDQL; Hansen-Estruch et al. 2023, arXiv 2304.10573): the policy imitates what is in
the replay buffer, and critics, which never see other actions, choose among its samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_fast.algorithms.diffusion_q import DiffusionQ, DiffusionQConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.policies.base import inverse_transform
from dppo_fast.replay import Transitions
from dppo_fast.types import Act, Obs, require_ranges


@dataclass(frozen=True)
class IDQLConfig(DiffusionQConfig):
    """A state's value is the ``expectile`` of its actions' values. Each decision is one of ``eval_sample_num`` samples:
    the best one, or while exploring with ``use_expectile_exploration`` any one, those that are better than the state's
    value with weight ``exploration_expectile`` and the others with what that lacks to 1.
    """

    target_ema_rate: float = 0.001
    replay_ratio: float = 128
    expectile: float = 0.8
    eval_sample_num: int = 10
    use_expectile_exploration: bool = True
    exploration_expectile: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"expectile": "(0, 1)", "eval_sample_num": "[1, inf)", "exploration_expectile": "(0, 1)"}
        require_ranges(self, "algorithm", ranges)


class IDQL(DiffusionQ):
    """``state_value`` learns from the target critics, and the critics from ``state_value``."""

    config: IDQLConfig
    judges = ("target_critic", "state_value")

    def __init__(self, config: IDQLConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.state_value = self.add_critic("state_value", parts.value())

    @torch.no_grad()
    def decide(self, obs: Obs, deterministic: bool) -> Act:
        draws, M, N = self.policy.schedule.steps + 1, self.config.eval_sample_num, len(obs["state"])
        noise = self.policy.draw_noise(N, draws * M + 1)
        candidates = self.candidates(obs, noise[:-1].view(draws, M, *noise.shape[1:]), deterministic)
        uniform = torch.special.ndtr(noise[-1, :, 0, 0])
        chosen = self.choose(obs, candidates, None if deterministic else uniform)
        action = candidates[chosen, torch.arange(N, device=chosen.device)]
        return Act(action, {} if deterministic else {"action": action})

    def candidates(self, obs: Obs, noise: Tensor, deterministic: bool) -> Tensor:
        """M samples for each of N envs, made of ``noise`` [S + 1, M, N, Th, Da]: [M, N, Th, Da]."""
        inputs = {**_repeat(obs, noise.shape[1]), "noise": noise.flatten(1, 2)}
        return self.policy.sampler(inputs, deterministic).action.view(noise.shape[1:])

    def choose(self, obs: Obs, candidates: Tensor, uniform: Tensor | None) -> Tensor:
        """Which of the ``candidates`` [M, N, Th, Da] each env takes, [N]; exploring needs numbers ``uniform`` [N] in
        [0, 1].
        """
        M, N = candidates.shape[:2]
        q = self.target_value(_repeat(obs, M), candidates.flatten(0, 1)).view(M, N)
        if uniform is None or not self.config.use_expectile_exploration:
            return q.argmax(0)
        weights = expectile_weights(q - self.state_value(obs), self.config.exploration_expectile)
        return inverse_transform(weights.t(), uniform)

    def critic_draws(self) -> dict[str, Tensor]:
        return {}

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        value_loss = self.value_loss(batch)
        self.descend("state_value", value_loss, stop)
        return {"loss/state_value": value_loss, **super().minibatch(batch, draws, due, stop)}

    def next_value(self, obs: Obs, draws: Mapping[str, Tensor]) -> Tensor:
        value: Tensor = self.state_value(obs)
        return value

    def advantage(self, batch: Transitions) -> Tensor:
        """[B]: what the target critics say of the action, less the state's value; only that has a gradient."""
        with torch.no_grad():
            q = self.target_value(batch.obs, batch.action)
        advantage: Tensor = q - self.state_value(batch.obs)
        return advantage

    def value_loss(self, batch: Transitions) -> Tensor:
        """Expectile regression (Kostrikov et al. 2021, arXiv 2110.06169, eq. 5)."""
        advantage = self.advantage(batch)
        return (expectile_weights(advantage, self.config.expectile) * advantage.square()).mean()


def expectile_weights(advantage: Tensor, expectile: float) -> Tensor:
    """``expectile`` where the advantage is positive, elsewhere 1 - ``expectile``."""
    return torch.where(advantage > 0, expectile, 1 - expectile)


def _repeat(obs: Obs, times: int) -> Obs:
    """[N, ...] -> [times * N, ...]."""
    return {name: value.expand(times, *value.shape).flatten(0, 1) for name, value in obs.items()}
