"""Algorithms that train diffusion policies with Q functions, small ones and those of golden cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from dppo_fast.algorithms.diffusion_q import DiffusionQ
from dppo_fast.algorithms.parts import Parts
from dppo_fast.networks.critic import CriticObs, CriticObsAct
from tests.algorithms.off_policy import parts
from tests.golden_files import Case
from tests.golden_models import CRITIC_ACTIVATION, Shapes, below, diffusion_policy, shapes_of, trunk_options, weights_of
from tests.small import diffusion_policy as small_policy

A = TypeVar("A", bound=DiffusionQ)


def small(cls: type[A], schema: type[Any], reference: bool = False, **config: Any) -> A:
    """In 4 environments, of 8 decisions an iteration, which make 4 minibatches."""
    options = schema(**{"batch_size": 8, "replay_ratio": 1, **config})
    return cls(options, parts(small_policy(ft_denoising_steps=0), reference=reference))


def golden(cls: type[A], schema: type[Any], case: Case, reference: bool = False, **config: Any) -> A:
    """With the networks and the discount of the case."""
    weights = weights_of(case)
    critics = {
        "critic": below(weights, "critic.") or below(weights, "critic_q."),
        "target_critic": below(weights, "critic_target.") or below(weights, "target_q."),
        "state_value": below(weights, "critic_v."),
    }
    shapes = {name: shapes_of(own) for name, own in critics.items() if own}
    algorithm_parts = replace(golden_parts(case, shapes), reference=reference)
    algorithm = cls(schema(gamma=case.cfg["gamma"], **config), algorithm_parts)
    for name in shapes:
        algorithm.networks[name].load_state_dict(critics[name])
    return algorithm


def golden_parts(case: Case, shapes: dict[str, Shapes]) -> Parts:
    """With critics that have ``shapes``."""
    policy = diffusion_policy({**case.cfg, "eta": None}, weights_of(case))  # an eta in cfg is the weight of Q
    obs_dim = case["in/state"][0].size
    dims = obs_dim, policy.action_dim, policy.horizon_steps

    def make(name: str, cls: type[nn.Module], *dims: int, **arguments: Any) -> nn.Module:
        style = trunk_options(below(shapes[name], "Q1."))
        return cls(*dims, activation_type=CRITIC_ACTIVATION, **style, **arguments)

    return parts(
        policy,
        value=lambda: make("state_value", CriticObs, obs_dim),
        action_value=lambda **arguments: make("critic", CriticObsAct, *dims, **arguments),
        n_steps=1,
        num_envs=1,
    )
