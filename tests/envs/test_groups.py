"""Groups of envs that step while the policy decides for the others: the same results, at the same time."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.envs import ChunkEnv, EnvConfig
from dppo_fast.envs.simulator import Array, Ids
from dppo_fast.log import read_metrics
from dppo_fast.types import Act, NoiseStream, Obs, UserError
from tests.envs.toy import ToySimulator, chunk_env
from tests.runs import DPPO, train
from tests.small import collector, diffusion_policy, gaussian_policy

N, T = 5, 9


def break_one(ids: Ids, state: Array, reward: Array) -> None:
    """Env 3 gives NaN in the third step of its second episode."""
    state[(ids == 3) & (state[:, 0] == 1) & (state[:, 1] == 3)] = math.nan


def toy(groups: int, **options: Any) -> ChunkEnv:
    simulator = ToySimulator(N, done_at={0: [5], 2: [13]}, limit_at={1: [9]}, corrupt=break_one)
    return chunk_env(simulator, groups=groups, **options)


class Elementwise:
    """Decides by noise and state alone, without products of matrices, whose rounding depends on the batch."""

    def __init__(self) -> None:
        self._policy = gaussian_policy()
        self.noise = self._policy.noise

    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        action = (self._policy.draw_noise(len(obs["state"]), 1)[0] + obs["state"][:, -1:, 1:]).clamp(-1, 1)
        return Act(action, {} if deterministic else {"action": action})


def rollouts(groups: int, make: Any, deterministic: bool) -> list[dict[str, Any]]:
    """All that two consecutive rollouts hold, and where the env is then."""
    policy, env, buffer = make(), toy(groups), RolloutBuffer(T, N)
    collect = collector(env, policy).collect
    found = []
    for _ in range(2):
        statistics = collect(buffer, deterministic)
        stored = {**buffer.obs, **buffer.record, **vars(buffer)} | {f"last/{k}": v for k, v in buffer.last_obs.items()}
        tensors = {name: value.clone() for name, value in stored.items() if isinstance(value, torch.Tensor)}
        final = [(t, {name: value.clone() for name, value in obs.items()}) for t, obs in buffer.final]
        found.append({**tensors, "final": final, "statistics": statistics, "noise": vars(policy.noise).copy()})
    found.append({"history": env.raw_obs["state"], "nan": env.nan_count, "chunks": env.state_dict()["episodes"]})
    return found


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("make", "groups", "rounding"), [(Elementwise, 2, 0.0), (Elementwise, 3, 0.0), (diffusion_policy, 2, 1e-5)]
)
def test_groups_do_not_change_a_number(make: Any, groups: int, rounding: float, deterministic: bool) -> None:
    expected = rollouts(1, make, deterministic)
    assert expected[-1]["nan"] == 1
    assert len(expected[0]["final"]) > 1
    for found, wanted in zip(rollouts(groups, make, deterministic), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)


def test_one_group_steps_while_the_policy_decides_for_the_other() -> None:
    """The simulator waits for the decision of the other group before it goes on: in turn, it would wait for ever."""
    decided = [Event(), Event()]

    class Patient(ToySimulator):
        waited: bool = True

        def step(self, actions: Array, ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
            if ids[0] == 0:
                self.waited &= decided[1].wait(10)
            return super().step(actions, ids)

    class Actor:
        noise = NoiseStream(0)

        def act(self, obs: Obs, deterministic: bool = False) -> Act:
            decided[int(self.noise.first_env > 0)].set()
            return Act(torch.zeros(len(obs["state"]), 4, 2), {})

    simulator = Patient(4)
    collector(chunk_env(simulator, groups=2), Actor()).collect(RolloutBuffer(1, 4))
    assert simulator.waited
    assert len(simulator.log) == 16


def test_a_run_with_groups_is_the_run_without(tmp_path: Path) -> None:
    rows = []
    for groups in (1, 2):
        run = tmp_path / str(groups)
        assert train(*DPPO, f"logdir={run}", "env.num_envs=4", f"env.groups={groups}", "train.n_train_itr=2") == 0
        metrics = read_metrics(run / "metrics.jsonl")
        rows.append([{k: v for k, v in row.items() if "/" in k and not k.startswith("time")} for row in metrics])
    for found, wanted in zip(rows[1], rows[0], strict=True):
        assert found.keys() == wanted.keys()
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, r"env\.groups=0: must be at least 1"),
        ({"groups": 3}, r"env\.groups=3: must be at most env\.num_envs=2"),
        ({"groups": 2, "normalization": "running"}, r"env\.groups=2: env\.normalization=running .* use 1"),
    ],
)
def test_groups_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EnvConfig(id="Hopper-v4", num_envs=2, act_steps=4, **options)
