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
        self.on_host = parts.device.type == "cpu"
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
        """Several epochs of minibatches of the decisions whose episodes ended, where there are any.

        A GPU's host does not wait for how many those are: minibatches beyond them change nothing.
        """
        c, finished = self.config, self.finished()
        size = finished.sum()
        length = int(size) if self.on_host else len(finished)
        self.weigh(finished)
        total, steps = torch.zeros((), device=size.device), torch.zeros((), device=size.device)
        for _ in range(c.update_epochs if length else 0):
            order = self.shuffled(finished)[:length]
            for start in range(0, max(length - c.batch_size, 0) + 1, c.batch_size):
                rows = order[start : start + c.batch_size]
                counted = torch.arange(start, start + len(rows), device=rows.device) < size
                stop = 1 - (counted.all() if start else counted.any()).float()
                inputs = {"rows": rows, "counted": counted, "stop": stop, **self.policy.cloning_draws(len(rows))}
                total += torch.where(stop > 0, 0, self.learn(inputs, None))
                steps += 1 - stop
        return {
            "loss/actor": total / steps.clamp(min=1),
            "rwr/weight": self.weight.sum() / size.clamp(min=1),
            "rwr/decisions": size,
            "lr/actor": self.trainable.schedule.lr,
        }

    def finished(self) -> Tensor:
        """Which decisions to learn from, [T N] bool."""
        over = self.buffer.terminated | self.buffer.truncated
        ends = (over & self.buffer.valid).float()
        return (reward_to_go(ends, over, gamma=1.0) > 0).flatten()

    def weigh(self, finished: Tensor) -> None:
        """Set the weights of the ``finished`` decisions [T N], and 0 for the others."""
        c, buffer = self.config, self.buffer
        returns = reward_to_go(buffer.reward, buffer.terminated | buffer.truncated, c.gamma).flatten()
        weight = exponential_weights(standardised(returns, finished), c.beta, c.max_reward_weight)
        self.weight.copy_(torch.where(finished, weight, 0))

    def shuffled(self, finished: Tensor) -> Tensor:
        """All rows [T N], the ``finished`` ones first, in random order."""
        order = torch.randperm(len(finished), generator=self.generator, device=finished.device)
        return order[(~finished[order]).byte().argsort(stable=True)]

    def _learn(self, inputs: Mapping[str, Tensor], _: None) -> Tensor:
        """One step on a minibatch, and its loss; what is not ``counted`` is replaced by the first row."""
        counted, buffer = inputs["counted"], self.buffer
        rows = torch.where(counted, inputs["rows"], inputs["rows"][:1])
        obs = {name: value.flatten(0, 1)[rows] for name, value in buffer.obs.items()}
        action = buffer.record["action"].flatten(0, 1)[rows]
        weight = self.weight[rows] * counted * (len(rows) / counted.sum().clamp(min=1))
        self.trainable.zero_grad()
        with matmul_precision(self.recipe.trained):
            loss = weighted_loss(self.policy, obs, action, weight, inputs)
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


def standardised(returns: Tensor, counted: Tensor) -> Tensor:
    """Less the mean, over the std, of those that are ``counted`` (bool)."""
    size = counted.sum().clamp(min=1)
    mean = torch.where(counted, returns, 0).sum() / size
    variance = torch.where(counted, returns - mean, 0).square().sum() / size
    return (returns - mean) / (variance.sqrt() + STD_FLOOR)
