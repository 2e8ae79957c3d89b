"""Whole fine-tuning runs, faults included, against the reference's: samples, minibatches, weights, rates and results.

Environments, noise and permutations are the recorded ones; everything else is ours, in the reference's way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import PPO, Batch, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.denoise_step import chunk_log_prob
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.policies.gaussian import GaussianPolicy
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.trainer import TrainConfig, Trainer
from dppo_fast.types import Act, Obs, Step
from tests.golden_files import Case, golden_cases
from tests.golden_models import CLASSES, build, diffusion_policy, gaussian_policy, options
from tests.policies.test_golden_gaussian import DETERMINISTIC_STD
from tests.tolerances import EXACT, LOG_PROB, LOSS, SAMPLE, TABLE, weights_after_training

INPUTS = {"returns": "returns", "oldvalues": "value", "advantages": "advantage"}
"""The reference's names of a minibatch's inputs -> ours."""

RESULTS = {
    "step": "env_steps",
    "train_episode_reward": "train/return",
    "eval_episode_reward": "eval/return",
    "eval_best_reward": "eval/best_reward",
    "eval_success_rate": "eval/success_rate",
}
"""The reference's names of logged numbers -> ours."""


class ScriptedEnv:
    """Answers what the reference's environments answered, to the same actions; a reset after a reset changes nothing."""

    max_episode_steps = 1

    def __init__(self, case: Case) -> None:
        self.case = case
        _, self.num_envs, self.act_steps, self.action_dim = case["venv/action"].shape
        self.obs_shapes = {"state": case["venv/obs"].shape[2:]}
        self.calls = self.steps = 0

    def reset(self, seed: int | None = None) -> Obs:
        if self.calls == 0 or self.case["venv/kind"][self.calls - 1] == 1:
            self._advance(kind=0)
        return self._obs()

    def step(self, action: Tensor) -> Step:
        self._advance(kind=1)
        t = self.steps
        self.steps += 1
        SAMPLE.check(action, self.case["venv/action"][t], f"action {t}")
        reward, terminated, truncated = (
            torch.from_numpy(self.case[f"venv/{name}"][t]) for name in ("reward", "terminated", "truncated")
        )
        return Step(self._obs(), None, reward.float(), terminated, truncated & ~terminated)

    def _advance(self, kind: int) -> None:
        assert self.case["venv/kind"][self.calls] == kind, f"call {self.calls} of the environments"
        self.calls += 1

    def _obs(self) -> Obs:
        return {"state": torch.from_numpy(self.case["venv/obs"][self.calls - 1]).float()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        raise NotImplementedError

    def close(self) -> None: ...


def updates_of(case: Case) -> list[Case]:
    names = dict.fromkeys(key.split("/")[1] for key in case if key.startswith("update/"))
    return [case.case(f"update/{name}") for name in names]


def draws_of(case: Case) -> Iterator[Tensor]:
    """The noise in the order of use: an iteration's samples, then its behaviour-cloning terms."""
    train = case.cfg["train"]
    samples = iter(case.tensor("sample_noise"))
    for iteration in range(train["n_train_itr"]):
        for _ in range(train["n_steps"]):
            yield next(samples)
        for update in updates_of(case):
            if update["itr"] == iteration and "bc_noise" in update:
                yield update.tensor("bc_noise")


class ReplayedDiffusionPolicy(DiffusionPolicy):
    """Samples with the recorded noise, and compares."""

    case: Case
    draws: Iterator[Tensor]
