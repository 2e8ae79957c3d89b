"""A `VecEnv` of the user's own: ``env.id=my_module:MyVecEnv`` calls ``MyVecEnv(config, device, seed)``.

``config`` is the run's `EnvConfig`, its ``options`` the class's own. The object executes whole chunks, normalised to
[-1, 1], and gives observations as the policy sees them (`dppo_fast.types.VecEnv`). What every call takes and gives is
held to that contract, so a mistake is named where it is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dppo_fast.envs.normalize import Normalization
from dppo_fast.envs.simulator import EnvConfig
from dppo_fast.types import Obs, Step, UserError, VecEnv

MEMBERS = (
    *("num_envs", "obs_shapes", "action_dim", "act_steps", "max_episode_steps"),
    *("reset", "step", "state_dict", "load_state_dict", "close"),
)


def task_ids() -> list[str]:
    """None: these environments are found by their import path."""
    return []


def make_vec_env(
    task_id: str,
    config: EnvConfig,
    device: torch.device,
    seed: int,
    normalization: Normalization | None,
    training: bool,
) -> VecEnv:
    """The object behind ``task_id``, checked. Raises UserError where it breaks the contract."""
    module, _, name = task_id.rpartition(":")
    env = getattr(importlib.import_module(module), name)(config, device, seed)
    return CheckedEnv(env, config, device)


class CheckedEnv:
    """The user's ``env``; raises UserError as soon as it breaks the contract of `VecEnv`."""

    def __init__(self, env: VecEnv, config: EnvConfig, device: torch.device) -> None:
        self._id, self._env, self._device = config.id, env, device
        for name in MEMBERS:
            self._require(hasattr(env, name), f"has no {name}")
        self._require(env.num_envs == config.num_envs, f"num_envs is {env.num_envs}, expected {config.num_envs}")
        self._require(env.act_steps == config.act_steps, f"act_steps is {env.act_steps}, expected {config.act_steps}")
        self._require("state" in env.obs_shapes, f"obs_shapes is {env.obs_shapes}, which lacks state")
        self.num_envs, self.act_steps, self.action_dim = env.num_envs, env.act_steps, env.action_dim
        self.max_episode_steps = env.max_episode_steps
        self.obs_shapes = env.obs_shapes
        self.normalization: Normalization | None = getattr(env, "normalization", None)

    def reset(self, seed: int | None = None) -> Obs:
        return self._checked(self._env.reset(seed), "reset")

    def step(self, action: Tensor) -> Step:
        step = self._env.step(action)
        self._require(isinstance(step, Step), f"step returned {type(step).__name__}, expected dppo_fast.types.Step")
        self._checked(step.obs, "step")
        if step.final_obs is not None:
            self._checked(step.final_obs, "step's final_obs")
        kinds = {"reward": torch.float32, "terminated": torch.bool, "truncated": torch.bool, "valid": torch.bool}
        for name, kind in kinds.items():
            if (value := getattr(step, name)) is not None or name != "valid":
                self._require_tensor(value, (self.num_envs,), kind, f"step's {name}")
        return step

    def state_dict(self) -> dict[str, Any]:
        return self._env.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        return self._checked(self._env.load_state_dict(state), "load_state_dict")

    def close(self) -> None:
        self._env.close()

    def __getattr__(self, name: str) -> Any:
        """``render``, ``nan_count`` and whatever else the user's has."""
        return getattr(self._env, name)

    def _checked(self, obs: Obs, where: str) -> Obs:
        self._require(isinstance(obs, Mapping), f"{where} returned {type(obs).__name__}, expected a dict of tensors")
        names = (sorted(obs), sorted(self.obs_shapes))
        self._require(names[0] == names[1], f"{where} returned {names[0]}, obs_shapes has {names[1]}")
        for name, shape in self.obs_shapes.items():
            kind = torch.float32 if name == "state" else torch.uint8
            self._require_tensor(obs[name], (self.num_envs, *shape), kind, f"{where}'s {name}")
        return obs

    def _require_tensor(self, value: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
        """``device`` is compared by its kind, as cuda and cuda:0 are one."""
        given = f"{what} is {type(value).__name__}"
        if isinstance(value, Tensor):
            given = f"{what} is {tuple(value.shape)} {value.dtype} on {value.device.type}"
        wanted = f"{what} is {shape} {dtype} on {self._device.type}"
        self._require(given == wanted, f"{given}, expected {wanted.removeprefix(what + ' is ')}")

    def _require(self, held: bool, complaint: str) -> None:
        if not held:
            raise UserError(f"env.id={self._id} breaks the contract of dppo_fast.types.VecEnv: {complaint}")
