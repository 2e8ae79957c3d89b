from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.data.trajectories import ChunkDataset, Trajectories
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.optim import LRConfig
from dppo_fast.policies.base import Policy
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from tests.small import diffusion_policy, distance, gaussian_policy, seeded, weights


def demonstrations(windows: int = 22) -> ChunkDataset:
    """One trajectory with states [3] and actions [2], windows of 2 observations and 4 actions."""
    rng = np.random.default_rng(0)
    steps = windows + 3
    states, actions = (rng.uniform(-1, 1, (steps, dim)).astype(np.float32) for dim in (3, 2))
    return ChunkDataset(Trajectories(states, actions, np.array([steps])), horizon=4, obs_steps=2)


def cloning(policy: Policy, dataset: ChunkDataset, **config: Any) -> BehaviourCloning:
    options = {"batch_size": 8, "lr_scheduler": LRConfig(min_lr=1e-2), "ema_decay": 0.5, **config}
    learner = BehaviourCloning(policy, BCConfig(**options), dataset)
    learner.generator = seeded(0)
    return learner


def test_an_epoch_visits_every_window_once() -> None:
    learner = cloning(diffusion_policy(ft_denoising_steps=0), demonstrations())
    batches = list(learner.epoch_batches())
    assert [len(batch) for batch in batches] == [8, 8, 6]
    assert sorted(torch.cat(batches).tolist()) == list(range(22))
    learner.update(0)
    assert learner.batches == 3


def test_the_average_follows_its_schedule() -> None:
    """A copy at every second batch before epoch 2, from then on half of the old and half of the new at every second."""
    policy = diffusion_policy(ft_denoising_steps=0)
    learner = cloning(policy, demonstrations(), epoch_start_ema=2, update_ema_freq=2)
    expected = weights(policy)
    number = 0
    for epoch in range(3):
        for indices in learner.epoch_batches():
            learner.minibatch(*learner.dataset.batch(indices), epoch)
            if number % 2 == 0:
                copies = epoch + 1 < 2
                new = weights(policy)
                expected = new if copies else [0.5 * a + 0.5 * b for a, b in zip(expected, new, strict=True)]
            number += 1
            assert distance(weights(learner.actor), expected) < 1e-6
    assert distance(weights(learner.actor), weights(policy)) > 1e-4


def test_an_entropy_bonus_widens_a_gaussian() -> None:
    def variance(ent_coef: float) -> float:
        policy = gaussian_policy(fixed_std=0.8, learn_fixed_std=True)
        learner = cloning(policy, demonstrations(), ent_coef=ent_coef)
        learner.update(0)
        learner.update(1)
        return policy.actor_ft.logvar.exp().mean().item()

    assert variance(10.0) > 0.8**2 > variance(0.0)


@pytest.mark.parametrize("make", [lambda: diffusion_policy(ft_denoising_steps=0), gaussian_policy])
def test_seeds_fix_everything(make: Any) -> None:
    def result() -> list[Tensor]:
        policy = make()
        learner = cloning(policy, demonstrations())
        learner.update(0)
        return weights(policy, learner.actor)

    assert distance(result(), result()) == 0


def test_a_diffusion_policy_learns_both_modes() -> None:
    """A mean would lie between them, where there is no data."""
    count = 512
    modes = np.where(np.arange(count) % 2, 0.6, -0.6) + np.random.default_rng(0).normal(0, 0.02, count)
    ones = np.ones(count, np.int64)
    data = Trajectories(np.zeros((count, 1), np.float32), modes[:, None].astype(np.float32), ones)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        style = {"activation_type": "ReLU", "residual_style": True}
        network = DiffusionMLP(1, 1, cond_dim=1, mlp_dims=(32, 32, 32), **style)
        policy = DiffusionPolicy(network, DiffusionConfig(denoising_steps=20), 1, 1)
    policy.generator = seeded(0)
    learner = cloning(policy, ChunkDataset(data, 1, 1), batch_size=256, ema_decay=0.9, epoch_start_ema=5)
    for epoch in range(200):
        learner.update(epoch)
    learner.actor.generator = seeded(1)
    action = learner.actor.act({"state": torch.zeros(400, 1, 1)}, deterministic=True).action.flatten()
    assert 0.4 < float((action > 0).float().mean()) < 0.6
    assert float(((action.abs() - 0.6).abs() < 0.2).float().mean()) > 0.85
