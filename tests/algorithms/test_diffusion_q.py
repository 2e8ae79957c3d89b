"""What holds for all algorithms that train diffusion policies with Q functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from dppo_fast.algorithms.diffusion_q import DiffusionQ
from dppo_fast.algorithms.dipo import DIPO, DIPOConfig
from dppo_fast.algorithms.dql import DQL, DQLConfig
from dppo_fast.algorithms.idql import IDQL, IDQLConfig
from dppo_fast.algorithms.qsm import QSM, QSMConfig
from dppo_fast.networks.critic import CriticObsAct
from dppo_fast.networks.mlp import ResidualMLP
from dppo_fast.types import UserError
from tests.algorithms.off_policy import parts
from tests.small import ACTION_DIM, HORIZON, diffusion_policy

ALGORITHMS: dict[type[DiffusionQ], type[Any]] = {DIPO: DIPOConfig, IDQL: IDQLConfig, DQL: DQLConfig, QSM: QSMConfig}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_residual_critics_are_residual(algorithm: type[DiffusionQ]) -> None:
    """The reference misspells the key, and its critics never are."""
    critic = partial(CriticObsAct, 6, ACTION_DIM, HORIZON, (16, 16, 16), residual_style=True)
    learner = algorithm(ALGORITHMS[algorithm](), parts(diffusion_policy(ft_denoising_steps=0), action_value=critic))
    for network in (learner.critic, learner.target):
        assert all(isinstance(trunk, ResidualMLP) for trunk in network.children())
        assert any(name.endswith("layers.1.l2.weight") for name, _ in network.named_parameters())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policies_that_keep_some_steps_frozen_are_refused(algorithm: type[DiffusionQ]) -> None:
    with pytest.raises(UserError, match=r"policy\.options\.ft_denoising_steps=2"):
        algorithm(ALGORITHMS[algorithm](), parts(diffusion_policy(ft_denoising_steps=2)))


@pytest.mark.parametrize(("replay_ratio", "minibatches"), [(1, 4), (16, 64), (0.25, 1)])
def test_replay_ratio(replay_ratio: float, minibatches: int) -> None:
    """Of 4 x 8 decisions an iteration, in batches of 8."""
    config = DIPOConfig(batch_size=8, replay_ratio=replay_ratio)
    assert len(DIPO(config, parts(diffusion_policy(ft_denoising_steps=0))).steps(0)) == minibatches
