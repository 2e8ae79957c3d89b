"""Policies, environments and rollouts that are small enough for quick tests; all their numbers follow from seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import PPO, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.envs import ChunkEnv
from dppo_fast.networks.critic import CriticObs
from dppo_fast.networks.eta import Eta
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.optim import LRConfig
from dppo_fast.policies.base import Policy
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.types import Actor, NoiseStream, Obs, Step, VecEnv
from tests.envs.toy import ToySimulator, chunk_env

OBS_SHAPE = (2, 3)
"""To, Do of the toy environment."""
HORIZON, ACTION_DIM = 4, 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observations(batch: int, seed: int = 0) -> Obs:
    return {"state": torch.randn(batch, *OBS_SHAPE, generator=seeded(seed))}


def diffusion_policy(
    eta: Eta | None = None, network: type[DiffusionMLP] = DiffusionMLP, **options: Any
) -> DiffusionPolicy:
    """S = 4, F = 2 unless told otherwise; the fine-tuned network differs from the base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor = network(ACTION_DIM, HORIZON, cond_dim=6, mlp_dims=(16, 16, 16), residual_style=True)
        config = DiffusionConfig(**{"denoising_steps": 4, "ft_denoising_steps": 2, **options})
        policy = DiffusionPolicy(actor, config, HORIZON, ACTION_DIM, eta)
        if policy.actor_ft is not None:
            perturb(policy.actor_ft, 0.1)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


def gaussian_policy(network: type[GaussianMLP] = GaussianMLP, **options: Any) -> GaussianPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor = network(ACTION_DIM, HORIZON, cond_dim=6, mlp_dims=(16, 16), **{"fixed_std": 0.3, **options})
        policy = GaussianPolicy(actor, GaussianConfig(), HORIZON, ACTION_DIM)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


def perturb(module: nn.Module, scale: float) -> None:
    generator = seeded(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def critic(cond_dim: int = 6) -> CriticObs:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return CriticObs(cond_dim, mlp_dims=(16, 16))


def toy_env(num_envs: int = 4, device: str = "cpu", **simulator: Any) -> ChunkEnv:
    """Episodes of 5, 9, then 13 steps, terminated and truncated in turn, then endless ones; chunks of 4 actions."""
    ends: dict[str, Any] = {"done_at": {0: [5], 2: [13]}, "limit_at": {1: [9]}}
    return chunk_env(ToySimulator(num_envs, **(ends | simulator)), device=device)


def collector(env: VecEnv, actor: Actor) -> Collector:
    """Ready to collect."""
    result = Collector(env, actor, EpisodeStatistics(env.num_envs, env.act_steps, success_threshold=0.5))
    result.reset(0)
    return result


def rollout(actor: Actor, steps: int = 8, device: str = "cpu") -> RolloutBuffer:
    """``steps`` decisions in 4 toy environments."""
    env = toy_env(device=device)
    buffer = RolloutBuffer(steps, env.num_envs, device)
    collector(env, actor).collect(buffer)
    return buffer


def algorithm(policy: Policy, buffer: RolloutBuffer, value: nn.Module | None = None, **config: Any) -> PPO:
    """DPPO for diffusion policies, PPO for the others, at a learning rate at which a few steps matter."""
    rates = dict.fromkeys(("actor_lr_scheduler", "critic_lr_scheduler"), LRConfig(min_lr=1e-2))
    config = {"batch_size": 16, "update_epochs": 2, **rates, **config}
    cls, schema = (DPPO, DPPOConfig) if isinstance(policy, DiffusionPolicy) else (PPO, PPOConfig)
    result = cls(policy, value or critic().to(buffer.device), schema(**config), buffer)
    result.generator = torch.Generator(buffer.device).manual_seed(4)
    return result


def weights(*modules: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference between parameters."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


class Bandit:
    """Episodes of one step, whose reward is minus the squared distance of the action to ``target``."""

    act_steps = max_episode_steps = 1

    def __init__(self, target: tuple[float, ...], num_envs: int) -> None:
        self.target = torch.tensor(target)
        self.num_envs, self.action_dim = num_envs, len(target)
        self.obs_shapes = {"state": (1, 1)}

    def reset(self, seed: int | None = None) -> Obs:
        return {"state": torch.zeros(self.num_envs, 1, 1)}

    def step(self, action: Tensor) -> Step:
        reward = -(action[:, 0] - self.target).square().sum(-1)
        over = torch.ones(self.num_envs, dtype=torch.bool)
        return Step(self.reset(), self.reset(), reward, over, ~over)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        return self.reset()

    def close(self) -> None: ...


def learn_bandit(policy: Policy, iterations: int, **config: Any) -> tuple[float, float]:
    """The mean reward of ``policy``, whose observations are [1, 1] and actions [1, 2], before and after training."""
    env = Bandit((0.8, -0.8), num_envs=64)
    learner = algorithm(policy, RolloutBuffer(1, env.num_envs), critic(cond_dim=1), **config)
    collect = collector(env, policy).collect
    returns = []
    for iteration in range(iterations):
        returns.append(collect(learner.buffer)["return"])
        learner.update(iteration)
    return returns[0], collect(learner.buffer)["return"]
