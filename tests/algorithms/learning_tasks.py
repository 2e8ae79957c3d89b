"""A task that every algorithm learns in seconds: to prefer the best of four actions, all of which the demonstrations
show equally often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.algorithms.parts import Parts
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.policies.base import Policy
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from dppo_fast.policies.probability_flow import FlowPolicy, FlowPolicyConfig
from dppo_fast.policies.squashed import SquashedGaussianPolicy
from dppo_fast.types import Actor, NoiseStream, Obs, Step
from tests.algorithms.off_policy import parts
from tests.small import Bandit, collector, seeded

MODES = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [-0.6, -0.6], [0.6, -0.6]])
HEIGHTS = torch.tensor([1.0, 0.6, 0.3, 0.1])
"""The reward of each mode, of which the first is the optimum."""
WIDTH = 0.4
"""How far from a mode its reward has fallen to exp(-1/2)."""
HILL_WIDTH = 0.8
SPREAD = 0.1
"""The standard deviation of the demonstrations around their mode."""


def reward(action: Tensor) -> Tensor:
    """[..., 2] -> [...]."""
    distance = (action[..., None, :] - MODES).square().sum(-1)
    return (HEIGHTS * torch.exp(-distance / (2 * WIDTH**2))).amax(-1)


def hill(action: Tensor) -> Tensor:
    """[..., 2] -> [...]; one wide hill with the same optimum, for what follows slopes and cannot compare modes."""
    return torch.exp(-(action - MODES[0]).square().sum(-1) / (2 * HILL_WIDTH**2))


class Modes(Bandit):
    """Episodes of one decision with this reward; the observation is always 0."""

    def __init__(self, num_envs: int, reward: Callable[[Tensor], Tensor] = reward) -> None:
        super().__init__((0.0, 0.0), num_envs)
        self.reward = reward

    def step(self, action: Tensor) -> Step:
        over = torch.ones(self.num_envs, dtype=torch.bool)
        return Step(self.reset(), self.reset(), self.reward(action[:, 0]), over, ~over)


@cache
def demonstrations() -> Trajectories:
    """64 episodes around each mode."""
    noise = SPREAD * torch.randn(64, 4, 2, generator=seeded(0))
    actions = (MODES + noise).flatten(0, 1).clamp(-1, 1)
    n = len(actions)
    return Trajectories(
        states=np.zeros((n, 1), np.float32),
        actions=actions.numpy(),
        traj_lengths=np.ones(n, np.int64),
        rewards=reward(actions).numpy(),
        terminals=np.ones(n, np.bool_),
    )


def untrained() -> DiffusionPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiffusionMLP(2, 1, cond_dim=1, time_dim=8, mlp_dims=(64, 64, 64))
    options = DiffusionConfig(denoising_steps=8, min_sampling_denoising_std=0.05, final_action_clip_value=1.0)
    policy = DiffusionPolicy(network, options, 1, 2)
    policy.generator = seeded(1)
    return policy


@cache
def pretrained() -> DiffusionPolicy:
    """On the demonstrations."""
    policy = untrained()
    network = policy.actor
    action = torch.from_numpy(demonstrations().actions)[:, None]
    obs, steps = {"state": torch.zeros(len(action), 1, 1)}, 400
    adam = torch.optim.Adam(network.parameters(), 1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, steps)
    for _ in range(steps):
        adam.zero_grad()
        policy.cloning_loss(obs, action).backward()
        adam.step()
        schedule.step()
    return policy


def diffusion(ft_steps: int = 0, cls: type[DiffusionPolicy] = DiffusionPolicy, **options: Any) -> DiffusionPolicy:
    """A policy of class ``cls`` that samples the four modes about equally often."""
    start = pretrained()
    config = DiffusionConfig(**vars(start.config) | {"ft_denoising_steps": ft_steps} | options)
    policy = cls(copy.deepcopy(start.actor), config, 1, 2)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


def gaussian(cls: type[GaussianPolicy] = GaussianPolicy, **options: Any) -> GaussianPolicy:
    """A policy of class ``cls`` as wide as the four modes together, whose mean lies between them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        style = {"mlp_dims": (32, 32), "tanh_output": False, "fixed_std": 0.4}
        policy = cls(GaussianMLP(2, 1, cond_dim=1, **style | options), GaussianConfig(), 1, 2)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


def squashed() -> GaussianPolicy:
    """One that learns its std and stays inside [-1, 1]."""
    return gaussian(SquashedGaussianPolicy, fixed_std=None, std_max=7.0)


def task_parts(policy: Policy, n_steps: int, num_envs: int) -> Parts:
    return parts(policy, 1, trajectories=demonstrations, n_steps=n_steps, num_envs=num_envs, cond_steps=1)


@torch.no_grad()
def score(actor: Actor, reward: Callable[[Tensor], Tensor] = reward) -> float:
    """The mean reward of 1000 deterministic decisions, of which the noise is always the same; at most 1."""
    before, actor.noise = actor.noise, NoiseStream(9)
    obs: Obs = {"state": torch.zeros(1000, 1, 1)}
    result = reward(actor.act(obs, deterministic=True).action[:, 0]).mean().item()
    actor.noise = before
    return result


def flow() -> FlowPolicy:
    """The diffusion policy's start, as a flow."""
    start = diffusion(8)
    config = FlowPolicyConfig(**vars(start.config) | {"sde_step_size": 0.125})
    policy = FlowPolicy(start.actor.requires_grad_(), config, 1, 2)
    policy.generator, policy.noise = start.generator, start.noise
    return policy


@dataclass(frozen=True)
class Learner:
    """How an algorithm goes about the task: its start, its options, and how much it sees."""

    policy: Callable[[], Policy]
    options: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 10
    n_steps: int = 4
    num_envs: int = 64
    reward: Callable[[Tensor], Tensor] = reward

    def learn(self, cls: type[OnlineAlgorithm], schema: type) -> tuple[float, float]:
        """The score before and after."""
        algorithm = cls.build(schema(**self.options), task_parts(self.policy(), self.n_steps, self.num_envs))
        assert algorithm.buffer is not None
        env = Modes(self.num_envs, self.reward)
        collect = collector(env, algorithm.actor).collect
        before = score(algorithm.actor, self.reward)
        for iteration in range(self.iterations):
            if algorithm.steps_to_collect(iteration):
                collect(algorithm.buffer)
            algorithm.update(iteration)
        return before, score(algorithm.actor, self.reward)
