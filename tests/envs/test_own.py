"""Environments of the user's own by import path: gymnasium classes with all kinds of spaces, and a `VecEnv`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from dppo_fast.envs import ChunkEnv, EnvConfig, make_env
from dppo_fast.envs.gymnasium import Layout
from dppo_fast.types import Obs, Step, UserError

CONFIG = EnvConfig(f"{__name__}:Counter", num_envs=3, act_steps=2)


class Counter:
    """A `VecEnv` whose state counts chunks; ``options.fault`` breaks what it says."""

    def __init__(self, config: EnvConfig, device: torch.device, seed: int) -> None:
        self.fault = config.options.get("fault", "")
        self.num_envs, self.act_steps = config.num_envs + (self.fault == "num_envs"), config.act_steps
        self.obs_shapes = {"camera" if self.fault == "obs_shapes" else "state": (1, 2)}
        self.action_dim, self.max_episode_steps = 1, 4
        self.device, self.age, self.closed = device, 0, False

    def reset(self, seed: int | None = None) -> Obs:
        self.age = seed or 0
        return {} if self.fault == "reset" else self._obs()

    def step(self, action: Tensor) -> Any:
        self.age += 1
        obs, no = self._obs(), torch.zeros(self.num_envs, dtype=torch.bool)
        reward = action.sum((1, 2))
        if self.fault == "tuple":
            return obs, reward, no, no, {}
        return Step(obs, obs, reward.double() if self.fault == "reward" else reward, no, no)

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        self.age = state["age"]
        return self._obs()

    def close(self) -> None:
        self.closed = True

    def _obs(self) -> Obs:
        return {"state": torch.full((3, 2) if self.fault == "obs" else (3, 1, 2), float(self.age))}


class Closeless(Counter):
    close: Any = property()


def test_a_vec_env_of_ones_own() -> None:
    env = make_env(CONFIG, "cpu", 0)
    assert env.reset(5)["state"].eq(5).all()
    step = env.step(torch.ones(3, 2, 1))
    assert step.reward.tolist() == [2, 2, 2]
    saved = env.state_dict()
    env.step(torch.ones(3, 2, 1))
    assert torch.equal(env.load_state_dict(saved)["state"], step.obs["state"])
    env.close()
    assert env.closed


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("num_envs", "num_envs is 4, expected 3"),
        ("obs_shapes", "obs_shapes is .*, which lacks state"),
        ("reset", r"reset returned \[\], obs_shapes has \['state'\]"),
        ("tuple", "step returned tuple, expected dppo_fast.types.Step"),
        ("obs", r"reset's state is \(3, 2\) torch.float32 on cpu, expected \(3, 1, 2\) torch.float32 on cpu"),
        ("reward", r"step's reward is \(3,\) torch.float64 on cpu, expected \(3,\) torch.float32 on cpu"),
    ],
)
def test_one_that_breaks_the_contract_is_told_where(fault: str, message: str) -> None:
    with pytest.raises(UserError, match=f"env.id=.*Counter breaks the contract of dppo_fast.types.VecEnv: {message}"):
        drive(replace(CONFIG, options={"fault": fault}))


def drive(config: EnvConfig) -> None:
    env = make_env(config, "cpu", 0)
    env.reset()
    env.step(torch.ones(3, 2, 1))


class Bare(Counter):
    def __init__(self, config: EnvConfig, device: torch.device, seed: int) -> None:
        raise ModuleNotFoundError("No module named 'my_physics'")


def test_a_package_that_it_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"env\.id=.*:Bare: not usable here \(No module named 'my_physics'\)$"):
        make_env(replace(CONFIG, id=f"{__name__}:Bare"), "cpu", 0)


def test_a_class_that_lacks_a_method_is_refused() -> None:
    with pytest.raises(UserError, match=r"Closeless breaks the contract .*: has no close"):
        make_env(replace(CONFIG, id=f"{__name__}:Closeless"), "cpu", 0)


class Arm(gymnasium.Env[Any, Any]):
    """Goal-conditioned, with a camera [H, W, C]; ``goal`` is an argument of its constructor."""

    observation_space = Dict(
        {
            "observation": Box(-1, 1, (2,)),
            "desired_goal": Dict({"position": Box(-1, 1, (3,)), "open": Box(0, 1, ())}),
            "wrist": Box(0, 255, (6, 4, 3), np.uint8),
        }
    )
    action_space = Box(-1, 1, (1,))

    def __init__(self, goal: float = 0.5) -> None:
        self.goal = goal

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.age = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.age += 1
        return self._obs(), 0.0, False, False, {}

    def _obs(self) -> Any:
        image = np.zeros((6, 4, 3), np.uint8)
        image[0, 1, 2] = self.age
        goal = {"position": np.full(3, self.goal, np.float32), "open": np.float32(1)}
        return {"observation": np.full(2, self.age, np.float32), "desired_goal": goal, "wrist": image}


def test_a_gymnasium_class_with_a_dict_of_dicts_and_a_camera() -> None:
    config = EnvConfig(f"{__name__}:Arm", num_envs=2, act_steps=2, max_episode_steps=4, options={"goal": 0.25})
    env = make_env(config, "cpu", 0)
    assert isinstance(env, ChunkEnv)
    assert env.obs_shapes == {"state": (1, 6), "wrist": (1, 3, 6, 4)}
    env.reset()
    obs = env.step(torch.zeros(2, 2, 1)).obs
    in_order = {"observation": [2, 2], "open": [1], "position": [0.25] * 3}
    names = [*Arm.observation_space.spaces["desired_goal"].spaces]  # type: ignore[attr-defined]
    goal = [x for name in names for x in in_order[name]]
    whole = [
        x for name in Arm.observation_space.spaces for x in {"observation": [2, 2], "desired_goal": goal}.get(name, [])
    ]
    assert obs["state"][1, 0].tolist() == whole
    assert obs["wrist"][1, 0, 2, 0, 1] == 2
    assert obs["wrist"].sum() == 4
    assert env.step(torch.zeros(2, 2, 1)).truncated.all()
    with pytest.raises(UserError, match=r"env\.options=\{'gaol': 1\}: .*Arm does not take them"):
        make_env(replace(config, options={"gaol": 1}), "cpu", 0)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Discrete(3), "observation state is Discrete"),
        (Dict({"state": Box(-1, 1, (2,)), "mode": Discrete(3)}), "observation mode is Discrete"),
        (Dict({"camera": Box(0, 255, (6, 4, 3), np.uint8)}), "observation state is None"),
        (Dict({"state": Box(-1, 1, (6, 4, 3))}), r"observation state is Box.*rank 2 at most"),
    ],
)
def test_spaces_that_a_policy_cannot_see_are_refused(space: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"env\.id=mine: {message}"):
        Layout("mine", space)


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(UserError, match=r"env\.id=no_such_module:Env: cannot import no_such_module"):
        make_env(replace(CONFIG, id="no_such_module:Env"), "cpu", 0)
    with pytest.raises(UserError, match=r"env\.id=tests\.envs\.test_own:Coutner, env\.backend=auto: unknown"):
        make_env(replace(CONFIG, id="tests.envs.test_own:Coutner"), "cpu", 0)
