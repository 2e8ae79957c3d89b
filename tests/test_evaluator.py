from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo_fast.evaluator import Evaluator
from dppo_fast.types import Act, NoiseStream, Obs, Step
from tests.small import seeded


class LadderEnv:
    """Env i ends after i + 1 chunks; chunk c of its first episode is worth ``10 i + c`` and the action, later ones 1e6.

    The seed shows in the observation.
    """

    num_envs, action_dim, act_steps, max_episode_steps = 4, 1, 2, 100

    def __init__(self, failing: bool = False) -> None:
        self.obs_shapes = {"state": (1, 1)}
        self.failing, self.closed = failing, False
        self.age, self.episode = torch.zeros(4), torch.zeros(4)
        self.seeds: list[int | None] = []

    def reset(self, seed: int | None = None) -> Obs:
        self.seeds.append(seed)
        return {"state": torch.full((4, 1, 1), float(seed or 0))}

    def step(self, action: Tensor) -> Step:
        if self.failing:
            raise RuntimeError("the simulator broke")
        assert action.shape == (4, 2, 1)
        reward = torch.where(self.episode == 0, 10 * torch.arange(4) + self.age + action[:, 0, 0], 1e6)
        self.age += 1
        over = self.age > torch.arange(4)
        self.age[over], self.episode = 0, self.episode + over
        obs = {"state": torch.zeros(4, 1, 1)}
        return Step(obs, obs, reward, over & (torch.arange(4) < 2), over & (torch.arange(4) >= 2))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


class NoisyActor:
    """Zero, or standard normal where it may be."""

    def __init__(self) -> None:
        self.noise = NoiseStream(3)

    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        noise = torch.randn(4, 3, 1, generator=seeded(self.noise.seed + self.noise.step))
        self.noise.step += 1
        return Act(noise * (not deterministic), {})


def test_every_env_counts_with_its_first_episode() -> None:
    result = Evaluator(LadderEnv, seed=7, success_threshold=10.0).evaluate(NoisyActor())
    returns = np.array([0, 10 + 11, 20 + 21 + 22, 30 + 31 + 32 + 33])
    assert result == pytest.approx(
        {
            "return": returns.mean(),
            "return_std": returns.std(),
            "return_p10": np.quantile(returns, 0.1),
            "return_p90": np.quantile(returns, 0.9),
            "success_rate": 0.5,  # best chunk per env step: 0, 5.5, 11, 16.5
            "best_reward": (0 + 11 + 22 + 33) / 2 / 4,
            "episode_length": 2 * (1 + 2 + 3 + 4) / 4,
            "episodes": 4,
        }
    )


def test_with_sparse_rewards_the_return_decides() -> None:
    result = Evaluator(LadderEnv, 7, success_threshold=21.0, sparse_reward=True).evaluate(NoisyActor())
    assert result["success_rate"] == 0.75
    assert result["best_reward"] == result["return"]


def test_evaluations_are_equal_and_leave_the_training_alone() -> None:
    actor = NoisyActor()
    noise = actor.noise
    evaluator = Evaluator(LadderEnv, seed=7, success_threshold=0.0, deterministic=False)
    first, second = evaluator.evaluate(actor), evaluator.evaluate(actor)
    assert first == second
    assert actor.noise is noise
    assert noise == NoiseStream(3)
    assert first != Evaluator(LadderEnv, 8, 0.0, deterministic=False).evaluate(actor)


@pytest.mark.parametrize("failing", [False, True])
def test_its_env_is_seeded_and_closed_whatever_happens(failing: bool) -> None:
    env, actor = LadderEnv(failing), NoisyActor()
    noise = actor.noise
    evaluator = Evaluator(lambda: env, seed=7, success_threshold=0.0)
    if failing:
        with pytest.raises(RuntimeError, match="the simulator broke"):
            evaluator.evaluate(actor)
    else:
        evaluator.evaluate(actor)
    assert env.seeds == [7]
    assert env.closed
    assert actor.noise is noise
