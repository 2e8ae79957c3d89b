"""D3IL avoid in PyTorch, for thousands of envs on a GPU: an approximation of `dppo_fast.envs.avoid`.

Table, rules and equations of motion are the same, integrated in steps of 5 ms in place of 1 ms; a collision takes the
rod out of the obstacle at once, without rebound, where MuJoCo's contact is soft. Along the scripted demonstrations,
which collide with nothing, the rod is 0.9 mm (rms) from MuJoCo's and never more than 3 mm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dppo_fast.envs.avoid_task import (
    ACTION_HIGH,
    ACTION_LOW,
    CARRIAGE_MASS,
    CONTROL_STEP,
    DAMPING,
    OBS_DIM,
    OBSTACLES,
    START,
    STIFFNESS,
    SWIVEL_INERTIA,
    cartesian,
    clearance,
    latch_sides,
    polar_target,
    reward_of,
)
from dppo_fast.envs.normalize import Identity, MinMax, Normalization
from dppo_fast.envs.simulator import EnvConfig, require_options
from dppo_fast.types import Obs, ObsShapes, Step, UserError

SUBSTEPS = 7
SUBSTEP = CONTROL_STEP / SUBSTEPS


def task_ids() -> list[str]:
    return ["avoid"]


def make_vec_env(
    task_id: str,
    config: EnvConfig,
    device: torch.device,
    seed: int,
    normalization: Normalization | None,
    training: bool,
) -> AvoidVecEnv:
    require_options(config, ())
    if normalization is None and config.normalization == "running":
        raise UserError("env.normalization=running: avoid_torch has fixed ranges; give a file, or none")
    if normalization is None and config.normalization == "none":
        normalization = Identity(ACTION_LOW, ACTION_HIGH)
    return AvoidVecEnv(config, device, normalization or MinMax.load(config.normalization, OBS_DIM, len(ACTION_LOW)))


class AvoidVecEnv:
    """A `VecEnv` on ``device`` with nothing random; all envs end their episodes, by the time limit, together.

    Nothing waits for the device.
    """

    def __init__(self, config: EnvConfig, device: torch.device, normalization: Normalization) -> None:
        self.num_envs, self.act_steps, self.action_dim = config.num_envs, config.act_steps, len(ACTION_LOW)
        self.max_episode_steps = config.max_episode_steps
        self.obs_shapes: ObsShapes = {"state": (config.obs_steps, OBS_DIM)}
        self.normalization = normalization
        self._time_limit_terminates = config.time_limit_terminates
        self._elapsed = 0

        self._device = device
        self._start, self._stiffness, self._damping = map(self._constant, (START, STIFFNESS, DAMPING))
        self._centres, self._mass = self._constant(OBSTACLES)[:, :2], self._constant(CARRIAGE_MASS)
        self._read_normalization()
        self._begin()

    def reset(self, seed: int | None = None) -> Obs:
        self._begin()
        return self._obs()

    def step(self, action: Tensor) -> Step:
        """Execute ``action`` [N, act_steps, Da]. Raises ValueError where the shape differs."""
        expected = (self.num_envs, self.act_steps, self.action_dim)
        if tuple(action.shape) != expected:
            raise ValueError(f"action has shape {tuple(action.shape)}, expected (N, act_steps, Da) = {expected}")
        reward = self._reward_zero.clone()
        for delta in (action.float() * self._action_scale + self._action_shift).unbind(1):
            reward += self._control_step(delta)
            self._elapsed += 1
            if self._elapsed == self.max_episode_steps:
                break
        over = self._elapsed == self.max_episode_steps
        final = self._obs() if over else None
        if over:
            self._begin()
        ended, never = (torch.full_like(self._collided, value) for value in (over, False))
        terminated, truncated = (ended, never) if self._time_limit_terminates else (never, ended)
        return Step(self._obs(), final, reward, terminated, truncated)

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, f"_{name}").clone() for name in self._STATE}
        return {**tensors, "elapsed": self._elapsed, "normalization": self.normalization.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        """Raises UserError where the state is of another number of envs or of observations."""
        for name in self._STATE:
            own, saved = getattr(self, f"_{name}"), state[name]
            if saved.shape != own.shape:
                raise UserError(f"env: the saved {name} has shape {list(saved.shape)}, here {list(own.shape)}")
            setattr(self, f"_{name}", saved.to(own.device).clone())
        self._elapsed = state["elapsed"]
        self.normalization.load_state_dict(state["normalization"])
        self._read_normalization()
        return self._obs()

    def close(self) -> None: ...

    _STATE = ("history", "desired", "target", "position", "velocity", "taken", "collided")

    def _constant(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _read_normalization(self) -> None:
        norm = self.normalization
        at_zero = norm.normalize_obs(np.zeros(OBS_DIM))
        self._obs_shift = self._constant(at_zero)
        self._obs_scale = self._constant(norm.normalize_obs(np.ones(OBS_DIM)) - at_zero)
        self._action_shift, high = (self._constant(norm.unnormalize_action(np.full(2, a))) for a in (0.0, 1.0))
        self._action_scale = high - self._action_shift

    def _begin(self) -> None:
        n, device = self.num_envs, self._device
        self._elapsed = 0
        self._desired = self._start.repeat(n, 1)  # [N, 2], as all below in metres and radians
        self._target = polar_target(self._desired)
        self._position = self._target.clone()
        self._velocity = torch.zeros_like(self._position)
        self._taken = torch.zeros(n, 9, dtype=torch.bool, device=device)
        self._collided = torch.zeros(n, dtype=torch.bool, device=device)
        self._reward_zero = torch.zeros(n, device=device)
        state = torch.cat((self._desired, cartesian(self._position)), 1)
        self._history = state[:, None].repeat(1, self.obs_shapes["state"][0], 1)  # [N, To, Do]

    def _obs(self) -> Obs:
        return {"state": self._history * self._obs_scale + self._obs_shift}

    def _control_step(self, delta: Tensor) -> Tensor:
        """Move the desired position by ``delta`` [N, 2]; the reward is that of before the motion."""
        self._desired = self._desired + delta
        rod = cartesian(self._position)
        state = torch.cat((self._desired, rod), 1)
        self._history = torch.cat((self._history[:, 1:], state[:, None]), 1)
        self._taken = latch_sides(self._taken, rod)
        reward = reward_of(self._taken, self._collided, rod)
        target = polar_target(self._desired)
        speed = (target - self._target) / CONTROL_STEP
        self._target = target
        for _ in range(SUBSTEPS):
            self._move(target, speed)
        return reward

    def _move(self, target: Tensor, speed: Tensor) -> None:
        """One semi-implicit Euler step of the boom, then out of what it runs into."""
        distance, (boom_rate, swivel_rate) = self._position[:, 0], self._velocity.unbind(-1)
        inertia = SWIVEL_INERTIA + CARRIAGE_MASS * distance**2
        force, torque = (self._stiffness * (target - self._position) + self._damping * (speed - self._velocity)).unbind(
            -1
        )
        boom = force / CARRIAGE_MASS + distance * swivel_rate**2
        swivel = (torque - 2 * CARRIAGE_MASS * distance * boom_rate * swivel_rate) / inertia
        self._velocity = self._velocity + SUBSTEP * torch.stack((boom, swivel), -1)
        self._position = self._position + SUBSTEP * self._velocity
        self._collide()

    def _collide(self) -> None:
        """Where the rod is inside an obstacle, move it to the surface and end its approach, with the least change."""
        rod = cartesian(self._position)
        depth, nearest = clearance(rod).min(-1)
        self._collided = self._collided | (depth <= 0)
        away = torch.nn.functional.normalize(rod - self._centres[nearest], dim=-1)
        distance, angle = self._position.unbind(-1)
        along = away[:, 0] * angle.cos() + away[:, 1] * angle.sin()
        around = (away[:, 1] * angle.cos() - away[:, 0] * angle.sin()) * distance
        gradient = torch.stack((along, around), -1)  # of the clearance
        masses = torch.stack((self._mass.expand_as(distance), SWIVEL_INERTIA + CARRIAGE_MASS * distance**2), -1)
        response = gradient / masses
        response = response / (gradient * response).sum(-1, keepdim=True)
        approach = (gradient * self._velocity).sum(-1).clamp(max=0)
        inside = (depth <= 0)[:, None]
        self._position = torch.where(inside, self._position - response * depth[:, None], self._position)
        self._velocity = torch.where(inside, self._velocity - response * approach[:, None], self._velocity)
