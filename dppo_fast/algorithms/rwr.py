"""Reward-weighted regression (RWR; Peters and Schaal 2007), for diffusion policies and those with a density."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.algorithms.parts import Parts
from dppo_fast.algorithms.weighted import exponential_weights, require_whole_chain, weighted_loss
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.gae import gae
from dppo_fast.optim import LRConfig, Trainable
from dppo_fast.runtime.graph import GraphedFunction
from dppo_fast.runtime.precision import matmul_precision
from dppo_fast.types import Metrics, ObsShapes, require_ranges

STD_FLOOR = 1e-3
"""Added to the returns' std, which may be 0."""


@dataclass(frozen=True)
class RWRConfig:
    """Hyperparameters; keys as in the reference.

    ``gamma`` discounts from one decision to the next, however many env steps its chunk has. Weights are
    exp(``beta`` z), at most ``max_reward_weight``, of standardised returns z.
    """

    gamma: float = 0.99
    beta: float = 10.0
    max_reward_weight: float = 100.0
    batch_size: int = 1000
    update_epochs: int = 16
    lr: float = 1e-4
    lr_scheduler: LRConfig = field(default_factory=LRConfig)
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        ranges = {
            "gamma": "(0, 1]",
            "beta": "[0, inf)",
            "max_reward_weight": "(0, inf)",
            "batch_size": "[1, inf)",
            "update_epochs": "[1, inf)",
            "lr": "(0, inf)",
            "weight_decay": "[0, inf)",
            "max_grad_norm": "(0, inf)",
        }
        require_ranges(self, "algorithm", ranges)
        self.lr_scheduler.require_valid("algorithm.lr_scheduler")


class RWR(OnlineAlgorithm):
    """Imitates the rollout's decisions, each with a weight that grows with the reward from there to the episode's end.

    Decisions in episodes that were still going on when the rollout ended, or that a failing simulator ended, have no
    such weight and are left out.
    """

    def __init__(self, config: RWRConfig, parts: Parts) -> None:
        require_whole_chain(parts.policy)
        c = self.config = config
        self.actor = self.policy = parts.policy
        self.generator = parts.generator
        self.recipe = parts.recipe
        self.buffer: RolloutBuffer = RolloutBuffer(parts.n_steps, parts.num_envs, parts.device)
        self.weight = torch.zeros(parts.n_steps * parts.num_envs, device=parts.device)
        self.trainable = Trainable(
            self.policy.trained().parameters(), c.lr, c.lr_scheduler, c.weight_decay, c.max_grad_norm
        )
        self.learn: GraphedFunction[None, Tensor] = GraphedFunction(self._learn, parts.graphs, idle={"stop": 1.0})

    @classmethod
    def build(cls, options: RWRConfig, parts: Parts) -> Self:
        return cls(options, parts)

    def steps_to_collect(self, iteration: int) -> int:
        return self.buffer.num_steps

    def update(self, iteration: int) -> Metrics:
        """Learn from the decisions whose episodes ended, where there are any."""
        rows = self.finished()
        learned = self.regress(rows) if len(rows) else {}
        return {**learned, "rwr/decisions": len(rows), "lr/actor": self.trainable.schedule.lr}

    def finished(self) -> Tensor:
        """The rows [M] of the decisions to learn from."""
        over = self.buffer.terminated | self.buffer.truncated
        ends = (over & self.buffer.valid).float()
        return reward_to_go(ends, over, gamma=1.0).flatten().nonzero().squeeze(-1)

    def regress(self, rows: Tensor) -> Metrics:
        """Several epochs of minibatches over ``rows`` [M]."""
        c, buffer = self.config, self.buffer
        returns = reward_to_go(buffer.reward, buffer.terminated | buffer.truncated, c.gamma).flatten()[rows]
        self.weight[rows] = exponential_weights(standardised(returns), c.beta, c.max_reward_weight)
        losses, stop = [], torch.zeros((), device=rows.device)
        for _ in range(c.update_epochs):
            order = rows[torch.randperm(len(rows), generator=self.generator, device=rows.device)]
            for start in range(0, max(len(rows) - c.batch_size, 0) + 1, c.batch_size):
                batch = order[start : start + c.batch_size]
                inputs = {"rows": batch, "stop": stop, **self.policy.cloning_draws(len(batch))}
                losses.append(self.learn(inputs, None).clone())
        return {"loss/actor": torch.stack(losses).mean(), "rwr/weight": self.weight[rows].mean()}

    def _learn(self, inputs: Mapping[str, Tensor], _: None) -> Tensor:
        """One step on a minibatch, and its loss."""
        rows, buffer = inputs["rows"], self.buffer
        obs = {name: value.flatten(0, 1)[rows] for name, value in buffer.obs.items()}
        action = buffer.record["action"].flatten(0, 1)[rows]
        self.trainable.zero_grad()
        with matmul_precision(self.recipe.trained):
            loss = weighted_loss(self.policy, obs, action, self.weight[rows], inputs)
            loss.backward()  # type: ignore[no-untyped-call]
        self.trainable.step(inputs["stop"])
        return loss.detach()

    def step_schedules(self, iteration: int) -> None:
        self.trainable.schedule.step()

    def memory(self, obs_shapes: ObsShapes) -> dict[str, int]:
        """Bytes of the rollout, and of all weights with their gradients and moments."""
        seen = sum(math.prod(shape) * (4 if name == "state" else 1) for name, shape in obs_shapes.items())
        chunk = 4 * self.policy.horizon_steps * self.policy.action_dim
        return {
            "rollout": len(self.weight) * (seen + chunk),
            "weights": sum(p.nbytes * (4 if p.requires_grad else 1) for p in self.policy.parameters()),
        }

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def state_dict(self) -> dict[str, Any]:
        return {"actor": self.trainable.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainable.load_state_dict(state["actor"])


def reward_to_go(reward: Tensor, over: Tensor, gamma: float) -> Tensor:
    """The discounted sum of ``reward`` [T, N] from each step to its episode's end, where ``over`` [T, N], or the last
    step.
    """
    zero = torch.zeros_like(reward)
    return gae(reward, zero, zero, zero[0], over, torch.zeros_like(over), gamma, 1.0)[1]


def standardised(returns: Tensor) -> Tensor:
    """Less their mean, over their std."""
    return (returns - returns.mean()) / (returns.std(correction=0) + STD_FLOOR)
