"""Broken numbers: those of the training stop it, those of a simulator do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.algorithms.ppo import PPO
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.checkpoint import Checkpoint, checkpoints
from dppo_fast.envs.simulator import Array, Ids
from dppo_fast.log import RunLog, read_metrics
from dppo_fast.optim import LRConfig
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.trainer import TrainConfig, Trainer, TrainingDiverged
from tests.small import algorithm, diffusion_policy, gaussian_policy, toy_env

STEPS, CHUNK, ITERATIONS = 6, 4, 4
NEVER = 10**9


class Corruption:
    """Spoils the toy environment once env step ``at`` is taken."""

    def __init__(self, at: int, state: float | None = None, reward: float | None = None) -> None:
        self.at, self.state, self.reward = at, state, reward
        self.calls = 0
        self.env: int | None = None

    def __call__(self, ids: Ids, state: Array, reward: Array) -> None:
        self.calls += 1
        if self.calls < self.at:
            return
        if self.reward is not None:
            reward[:] = self.reward
        if self.state is not None and self.env is None:
            self.env = int(ids[1])
            state[1, 0] = self.state


def trainer(run: Path, policy: Any, corrupt: Corruption, **config: Any) -> Trainer:
    env = toy_env(corrupt=corrupt)
    learner = algorithm(policy, RolloutBuffer(STEPS, env.num_envs), **config)
    policy.generator = learner.generator = generator = torch.Generator().manual_seed(0)
    statistics = EpisodeStatistics(env.num_envs, env.act_steps, 0.0)
    settings = TrainConfig(n_train_itr=ITERATIONS, n_steps=STEPS, val_freq=0)
    return Trainer(learner, settings, run, generator, Collector(env, policy, statistics))


def train(trainer: Trainer) -> None:
    with RunLog(trainer.run, ITERATIONS, live=False, tensorboard=False) as log:
        trainer.train(log)


@pytest.mark.parametrize("make", [gaussian_policy, diffusion_policy])
def test_a_loss_that_overflows_stops_the_run_at_the_last_good_checkpoint(make: Any, tmp_path: Path) -> None:
    third_rollout = 2 * STEPS * CHUNK + 4 * CHUNK
    run = trainer(tmp_path, make(), Corruption(third_rollout, reward=1e30), reward_scale_running=False)
    with pytest.raises(TrainingDiverged, match=r"iteration 3: loss/value.* is not finite") as error:
        train(run)
    good = checkpoints(tmp_path)[-1]
    assert str(good) in str(error.value)
    checkpoint = Checkpoint.load(good)
    assert checkpoint.iteration == 2
    assert all(torch.isfinite(value).all() for values in checkpoint.weights.values() for value in values.values())
    run.restore(good)
    assert run.iteration == 2
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("make", [gaussian_policy, diffusion_policy])
def test_a_loss_that_is_nan_stops_the_run(make: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, make(), Corruption(NEVER), actor_lr_scheduler=LRConfig(min_lr=1e30))
    with pytest.raises(TrainingDiverged, match=r"iteration 1: loss/policy.* is not finite") as error:
        train(run)
    assert str(checkpoints(tmp_path)[-1]) in str(error.value)
    assert Checkpoint.load(checkpoints(tmp_path)[-1]).iteration == 0


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    """The losses of that iteration were finite still."""
    options = {"actor_lr_scheduler": LRConfig(min_lr=1e38), "update_epochs": 1, "batch_size": 10**6}
    run = trainer(tmp_path, gaussian_policy(), Corruption(NEVER), **options)
    with pytest.raises(TrainingDiverged, match="iteration 1: a weight of policy is not finite"):
        train(run)
    assert Checkpoint.load(checkpoints(tmp_path)[-1]).iteration == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("make", [gaussian_policy, diffusion_policy])
def test_a_broken_simulator_is_reset_and_masked(
    make: Any, broken: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corruption = Corruption(STEPS * CHUNK + 4 * CHUNK, state=broken)
    run = trainer(tmp_path, make(), corruption)
    masks: list[np.ndarray] = []
    update = PPO.update

    def watched(self: PPO, iteration: int) -> Any:
        masks.append(~self.buffer.valid.numpy().copy())
        return update(self, iteration)

    monkeypatch.setattr(PPO, "update", watched)
    train(run)

    assert corruption.env is not None
    assert [mask.sum() for mask in masks] == [0, 1, 0, 0]
    (when,), (where,) = masks[1].nonzero()
    assert where == corruption.env
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row.get("train/nan_count") for row in rows] == [None, 0, 1, 1, 1]
    assert len(rows) == 1 + ITERATIONS
    for row in rows[1:]:
        assert all(math.isfinite(row[key]) for key in row if key.startswith("loss/"))
    assert 0 < when < STEPS
