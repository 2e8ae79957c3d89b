"""Diffusion policy policy optimisation (Ren et al. 2024, arXiv 2409.00588): PPO over denoising steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.parts import Parts
from dppo_fast.algorithms.ppo import PPO, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.ppo_loss import PolicyLoss, chain_ppo_loss, ppo_loss
from dppo_fast.optim import LRConfig, Trainable
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.policies.probability_flow import FlowPolicy
from dppo_fast.types import Obs, Record, UserError, require_ranges


@dataclass(frozen=True)
class DPPOConfig(PPOConfig):
    """``clip_ploss_coef_base`` and ``_coef`` are the clip ranges at the earliest and last fine-tuned step.

    Every ``ft_denoising_steps_t`` iterations ``ft_denoising_steps_d`` fewer steps are fine-tuned (0: never). The
    sampling std's floor moves linearly to ``min_sampling_denoising_std_final`` over
    ``min_sampling_denoising_std_iterations``.
    """

    gamma_denoising: float = 0.99
    clip_ploss_coef_base: float = 1e-3
    clip_ploss_coef_rate: float = 3.0
    ft_denoising_steps_d: int = 0
    ft_denoising_steps_t: int = 0
    min_sampling_denoising_std_final: float | None = None
    min_sampling_denoising_std_iterations: int = 0
    eta_lr: float = 1e-3
    eta_lr_scheduler: LRConfig = field(default_factory=LRConfig)
    eta_weight_decay: float = 0.0
    eta_update_interval: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "gamma_denoising": "(0, 1]",
            "clip_ploss_coef_base": "(0, inf)",
            "clip_ploss_coef_rate": "(0, inf)",
            "ft_denoising_steps_d": "[0, inf)",
            "ft_denoising_steps_t": "[0, inf)",
            "min_sampling_denoising_std_final": "(0, inf)",
            "min_sampling_denoising_std_iterations": "[0, inf)",
            "eta_lr": "(0, inf)",
            "eta_weight_decay": "[0, inf)",
            "eta_update_interval": "[1, inf)",
        }
        require_ranges(self, "algorithm", ranges)
        self.eta_lr_scheduler.require_valid("algorithm.eta_lr_scheduler")


def step_tables(config: DPPOConfig, F: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[F] weights of the advantage and [F] clip ranges of the fine-tuned steps."""
    k = torch.arange(F, device=device)
    share = k / (F - 1) if F > 1 else torch.ones(1, device=device)
    growth = torch.expm1(config.clip_ploss_coef_rate * share) / math.expm1(config.clip_ploss_coef_rate)
    clip = config.clip_ploss_coef_base + (config.clip_ploss_coef - config.clip_ploss_coef_base) * growth
    return config.gamma_denoising ** (F - 1 - k).float(), clip


def chain_policy_loss(
    policy: DiffusionPolicy,
    obs: Obs,
    part: Record,
    k: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    discount_table: Tensor,
    clip_table: Tensor,
) -> PolicyLoss:
    """The clipped objective of fine-tuned steps ``k`` [B] with normalised advantages, in one pass over the transitions
    where all of them share a schedule, which learned etas give up.
    """
    if policy.eta_of(obs) is not None:
        log_prob = policy.log_prob(obs, part, k)
        return ppo_loss(log_prob, old_log_prob, advantage * discount_table[k], clip_table[k])
    return chain_ppo_loss(
        policy.predict(obs, part["x"], k),
        part["x"],
        part["x_next"],
        old_log_prob,
        advantage,
        k,
        policy.schedule.table[policy.first_ft_step :],
        clip_table,
        discount_table,
        policy.min_log_prob_std,
        policy.reward_horizon,
        policy.clips.x0,
        policy.clips.eps,
    )


class DPPO(PPO):
    """PPO whose parts are the F fine-tuned denoising steps; k = 0 is the earliest.

    Advantages are discounted by gamma_denoising^(F-1-k); the clip range grows exponentially with k.
    """

    trains = DiffusionPolicy
    policy: DiffusionPolicy
    config: DPPOConfig

    @classmethod
    def build(cls, options: PPOConfig, parts: Parts) -> Self:
        if isinstance(parts.policy, FlowPolicy):
            raise UserError("policy.name=flow has no denoising steps to score; use algorithm.name=exact_ppo")
        return super().build(options, parts)

    def __init__(
        self,
        policy: DiffusionPolicy,
        critic: nn.Module,
        config: DPPOConfig,
        buffer: RolloutBuffer,
        bootstrap_truncated: bool = True,
        shift_once: bool = False,
    ) -> None:
        super().__init__(policy, critic, config, buffer, bootstrap_truncated, shift_once)
        self.initial_min_sampling_std = policy.min_sampling_std
        if policy.config.learn_eta:
            assert policy.eta is not None
            self.trainables["eta"] = Trainable(
                policy.eta.parameters(), config.eta_lr, config.eta_lr_scheduler, config.eta_weight_decay
            )
        self._build_tables()

    def policy_loss(self, obs: Obs, part: Record, k: Tensor, old_log_prob: Tensor, advantage: Tensor) -> PolicyLoss:
        tables = self.discount_table, self.clip_table
        return chain_policy_loss(self.policy, obs, part, k, old_log_prob, advantage, *tables)

    def due(self, iteration: int, index: int) -> tuple[str, ...]:
        due = super().due(iteration, index)
        eta = "eta" in self.trainables and "actor" in due and index % self.config.eta_update_interval == 0
        return (*due, "eta") if eta else due

    def step_schedules(self, iteration: int) -> None:
        super().step_schedules(iteration)
        if "eta" in self.trainables and iteration >= self.config.n_critic_warmup_itr:
            self.trainables["eta"].schedule.step()

    def after_update(self, iteration: int) -> None:
        """Anneal F and the sampling std for the next iteration."""
        c, policy = self.config, self.policy
        if c.ft_denoising_steps_d and c.ft_denoising_steps_t and (iteration + 1) % c.ft_denoising_steps_t == 0:
            policy.set_ft_steps(max(policy.ft_steps - c.ft_denoising_steps_d, 1))
            self._build_tables()
        if c.min_sampling_denoising_std_final is not None:
            share = min((iteration + 1) / max(c.min_sampling_denoising_std_iterations, 1), 1.0)
            start = self.initial_min_sampling_std
            policy.set_min_sampling_std(start + (c.min_sampling_denoising_std_final - start) * share)

    def _build_tables(self) -> None:
        self.batch = None
        self.learn.forget()
        self.discount_table, self.clip_table = step_tables(self.config, self.policy.ft_steps, self.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "ft_steps": self.policy.ft_steps,
            "min_sampling_std": self.policy.min_sampling_std,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.policy.ft_steps = int(state["ft_steps"])
        self.policy.min_sampling_std = float(state["min_sampling_std"])
        self.policy.sampler.forget()
        self._build_tables()
