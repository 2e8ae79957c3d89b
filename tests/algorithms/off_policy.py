"""Small parts for algorithms that learn from a replay buffer, also from golden cases."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.off_policy import OffPolicy
from dppo_fast.algorithms.parts import Parts
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.networks.critic import CriticObs, CriticObsAct
from dppo_fast.networks.mlp import GaussianMLP
from dppo_fast.policies.base import Policy
from dppo_fast.policies.gaussian import GaussianConfig
from dppo_fast.policies.squashed import SquashedGaussianPolicy
from dppo_fast.replay import Transitions
from dppo_fast.types import NoiseStream
from tests.golden_files import Case
from tests.golden_models import (
    ACTOR_ACTIVATION,
    CRITIC_ACTIVATION,
    base_weights,
    below,
    gaussian_mlp_options,
    shapes_of,
    trunk_options,
)
from tests.small import ACTION_DIM, HORIZON, OBS_SHAPE, collector, seeded, toy_env
from tests.test_zero_waste import no_host_sync


def squashed_policy(obs_dim: int = 6, action_dim: int = ACTION_DIM, horizon: int = HORIZON) -> SquashedGaussianPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GaussianMLP(action_dim, horizon, obs_dim, (32, 32), tanh_output=False, std_max=7.0)
        policy = SquashedGaussianPolicy(network, GaussianConfig(), horizon, action_dim)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


def parts(policy: Policy, obs_dim: int = 6, **changes: Any) -> Parts:
    """4 environments, 8 decisions an iteration; critics of two layers."""
    seeds = count()
    sizes = {"mlp_dims": (32, 32)}

    def make(cls: type[nn.Module], *dims: int, **arguments: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(100 + next(seeds))
            return cls(*dims, **sizes, **arguments)

    dims = obs_dim, policy.action_dim, policy.horizon_steps
    defaults: dict[str, Any] = {
        "policy": policy,
        "value": lambda **arguments: make(CriticObs, obs_dim, **arguments),
        "action_value": lambda **arguments: make(CriticObsAct, *dims, **arguments),
        "trajectories": lambda: demonstrations(obs_dim // OBS_SHAPE[0], policy.action_dim),
        "num_envs": 4,
        "n_steps": 8,
        "act_steps": policy.horizon_steps,
        "cond_steps": OBS_SHAPE[0],
        "device": torch.device("cpu"),
        "generator": seeded(4),
    }
    return Parts(**(defaults | changes))


def demonstrations(state_dim: int = OBS_SHAPE[1], action_dim: int = ACTION_DIM) -> Trajectories:
    """Three random trajectories, of which the second was cut off; the reward of step t is t."""
    rng = np.random.default_rng(5)
    lengths = np.array([12, 9, 7])
    steps = int(lengths.sum())
    ends = np.cumsum(lengths) - 1
    terminals = np.isin(np.arange(steps), ends[[0, 2]])
    return Trajectories(
        states=rng.standard_normal((steps, state_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
        traj_lengths=lengths,
        rewards=np.arange(steps, dtype=np.float32),
        terminals=terminals,
    )


def check_capturable(algorithm: OffPolicy) -> None:
    """The host waits for nothing in an update, and nothing is drawn in a gradient step; so a CUDA graph can hold it."""
    collect = collector(toy_env(), algorithm.actor).collect
    learn, dues = algorithm.learn.function, set()

    def watched(inputs: Mapping[str, Tensor], due: tuple[str, ...]) -> Tensor:
        dues.add(due)
        before = algorithm.generator.get_state(), torch.get_rng_state()
        values = learn(inputs, due)
        for state, later in zip(before, (algorithm.generator.get_state(), torch.get_rng_state()), strict=True):
            assert torch.equal(state, later), "random numbers belong in draws()"
        return values

    algorithm.learn.function = watched
    collect(algorithm.buffer)
    algorithm.update(0)
    assert any("actor" in due for due in dues)
    algorithm.learn.function = learn
    collect(algorithm.buffer)
    with pytest.MonkeyPatch.context() as patch, no_host_sync():
        patch.setenv("DPPO_FAST_BACKEND", "reference")  # the C++ ops are for the CPU
        algorithm.update(1)


def golden_parts(case: Case) -> Parts:
    """With the case's actor, and critics of which the caller sets the weights."""
    weights = case.tensors("w/")
    horizon_steps, action_dim = case["in/actions"].shape[1:]
    shapes = shapes_of(base_weights(weights))
    network = GaussianMLP(
        **gaussian_mlp_options(shapes)
        | {"action_dim": action_dim, "horizon_steps": horizon_steps, "tanh_output": False},
        activation_type=ACTOR_ACTIVATION,
    )
    config = GaussianConfig(case.cfg["randn_clip_value"])
    policy = SquashedGaussianPolicy(network, config, horizon_steps, action_dim)
    policy.actor_ft.load_state_dict(base_weights(weights))
    critic = shapes_of(below(weights, "target_critic.") or below(weights, "target_networks.0."))
    style = {"activation_type": CRITIC_ACTIVATION, **trunk_options(below(critic, "Q1."))}
    dims = case["in/state"][0].size, action_dim, horizon_steps
    return parts(policy, action_value=lambda **more: CriticObsAct(*dims, **style, **more), n_steps=1, num_envs=1)


def golden_transitions(case: Case) -> Transitions:
    return Transitions(
        {"state": case.tensor("in/state")},
        case.tensor("in/actions"),
        case.tensor("in/rewards"),
        {"state": case.tensor("in/next_state")},
        case.tensor("in/terminated"),
        {},
    )


def chunk_noise(case: Case, name: str) -> Tensor:
    """The draw ``name`` as [B, Th, Da]."""
    return case.tensor(name).view_as(case.tensor("in/actions"))
