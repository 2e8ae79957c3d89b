"""D3IL avoid in MuJoCo, with a boom in the Panda's place (see `dppo_fast.envs.avoid_task`).

The boom tracks 96 recorded demonstrations of the Panda, given their desired positions alone, with an rms error of
6.4 mm (median 4.2 mm, 95th percentile 11 mm), where the lag of the Panda itself is 26 mm.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dppo_fast.envs.avoid_task import (
    ACTION_HIGH,
    ACTION_LOW,
    CARRIAGE_MASS,
    CONTROL_STEP,
    DAMPING,
    FINISH_Y,
    OBS_DIM,
    OBSTACLES,
    ROD_HEIGHT,
    ROD_RADIUS,
    START,
    STIFFNESS,
    SUBSTEP,
    SUBSTEPS,
    SWIVEL_INERTIA,
    cartesian,
    clearance,
    latch_sides,
    polar_target,
    reward_of,
)
from dppo_fast.envs.simulator import Array, EnvConfig, Ids, require_options
from dppo_fast.runtime.gl import require_gl

PICTURE_SIZE = 480

MODEL = f"""
<mujoco model="avoid">
  <option timestep="{SUBSTEP}" gravity="0 0 0" integrator="implicitfast"/>
  <visual>
    <global offwidth="{PICTURE_SIZE}" offheight="{PICTURE_SIZE}"/>
    <headlight ambient="0.5 0.5 0.5"/>
  </visual>
  <default>
    <geom contype="0" conaffinity="0"/>
    <default class="obstacle">
      <geom type="cylinder" contype="2" conaffinity="1" condim="1" solref="0.004 1" rgba="0.8 0.25 0.2 1"/>
    </default>
    <default class="rod"><geom contype="1" conaffinity="2" condim="1" rgba="0.2 0.2 0.25 1"/></default>
    <default class="arm"><geom rgba="0.9 0.9 0.92 1"/></default>
  </default>
  <worldbody>
    <light pos="0.2 -0.6 1.6" dir="0.2 0.4 -1"/>
    <camera name="table" pos="-0.25 -0.75 1.0" xyaxes="0.72 -0.69 0 0.44 0.46 0.77"/>
    <geom type="box" pos="0.5 0.1 -0.02" size="0.4 0.5 0.02" rgba="0.75 0.65 0.5 1"/>
    <geom type="box" pos="0.5 {FINISH_Y} 0.001" size="0.3 0.004 0.001" rgba="0.2 0.6 0.3 1"/>
    <geom type="cylinder" pos="0 0 0.15" size="0.06 0.15" rgba="0.9 0.9 0.92 1"/>
    {"".join(f'<geom class="obstacle" pos="{x} {y} 0.075" size="{r} 0.075"/>' for x, y, r in OBSTACLES)}
    <body pos="0 0 0.3" childclass="arm">
      <joint name="swivel" axis="0 0 1"/>
      <inertial pos="0 0 0" mass="1" diaginertia="{SWIVEL_INERTIA} {SWIVEL_INERTIA} {SWIVEL_INERTIA}"/>
      <geom type="box" pos="0.42 0 0.03" size="0.46 0.025 0.02"/>
      <body childclass="rod">
        <joint name="boom" type="slide" axis="1 0 0"/>
        <inertial pos="0 0 0" mass="{CARRIAGE_MASS}" diaginertia="1e-6 1e-6 1e-6"/>
        <geom type="sphere" pos="0 0 {ROD_HEIGHT - 0.3}" size="{ROD_RADIUS}"/>
        <geom type="cylinder" fromto="0 0 {ROD_HEIGHT - 0.3} 0 0 0" size="{ROD_RADIUS}" contype="0" conaffinity="0"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position joint="boom" kp="{STIFFNESS[0]}" kv="{DAMPING[0]}"/>
    <position joint="swivel" kp="{STIFFNESS[1]}" kv="{DAMPING[1]}"/>
  </actuator>
</mujoco>
"""


def task_ids() -> list[str]:
    return ["avoid"]


def make(task_id: str, config: EnvConfig) -> AvoidSimulator:
    require_options(config, ())
    return AvoidSimulator(config.num_envs, config.num_threads)


class AvoidSimulator:
    """A `Simulator` that never terminates and has nothing random; it steps its envs in ``num_threads`` threads.

    As in the original, the state is the desired position and the rod's, and it and the reward are taken before
    a control step is executed: they are one step old.
    """

    def __init__(self, num_envs: int, num_threads: int = 0) -> None:
        import mujoco
        from mujoco.rollout import rollout

        self._mujoco, self._rollout = mujoco, rollout
        self.num_envs = num_envs
        self.obs_shapes = {"state": (OBS_DIM,)}
        self.action_low, self.action_high = ACTION_LOW, ACTION_HIGH
        self._model = mujoco.MjModel.from_xml_string(MODEL)
        self._scratch = [mujoco.MjData(self._model) for _ in range(min(num_envs, num_threads or os.cpu_count() or 1))]
        self._renderer: Any = None
        start = polar_target(torch.tensor([START], dtype=torch.float64))[0]
        self._start = torch.tensor([0, start[1], start[0], 0, 0], dtype=torch.float64)  # time, qpos, qvel
        self._physics = self._start.repeat(num_envs, 1)  # [N, 5]
        self._desired = torch.tensor(START, dtype=torch.float64).repeat(num_envs, 1)
        self._target = start.repeat(num_envs, 1)
        self._taken = torch.zeros(num_envs, 9, dtype=torch.bool)
        self._collided = torch.zeros(num_envs, dtype=torch.bool)

    def seed(self, seed: int, resets: Ids) -> None: ...

    def reset(self, ids: Ids) -> dict[str, Array]:
        self._physics[ids] = self._start
        self._desired[ids] = torch.tensor(START, dtype=torch.float64)
        self._target[ids] = polar_target(self._desired[ids])
        self._taken[ids] = False
        self._collided[ids] = False
        return {"state": self._observed(ids).numpy()}

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        self._desired[ids] += torch.from_numpy(actions)
        state = self._observed(ids)
        rod = state[:, 2:]
        self._taken[ids] = latch_sides(self._taken[ids], rod)
        reward = reward_of(self._taken[ids], self._collided[ids], rod)
        self._execute(ids)
        never = np.zeros(len(ids), np.bool_)
        return {"state": state.numpy()}, reward.numpy(), never, never

    def _execute(self, ids: Ids) -> None:
        """One control step towards the desired positions, and with the speed at which they move."""
        target = polar_target(self._desired[ids])
        speed = (target - self._target[ids]) / CONTROL_STEP
        self._target[ids] = target
        control = target + speed * torch.tensor(DAMPING, dtype=torch.float64) / torch.tensor(STIFFNESS)
        states, _ = self._rollout(
            self._model, self._scratch, self._physics[ids].numpy(), control[:, None].numpy(), nstep=SUBSTEPS
        )
        path = torch.from_numpy(states)  # [n, substeps, 5]
        self._physics[ids] = path[:, -1]
        self._collided[ids] |= (clearance(_rod(path)) <= 0).flatten(1).any(1)

    def render(self, env: int) -> NDArray[np.uint8]:
        """A picture [H, W, 3] of one env now. Raises UserError where there is nothing to draw with."""
        require_gl("env.id=avoid")
        if self._renderer is None:
            self._renderer = self._mujoco.Renderer(self._model, PICTURE_SIZE, PICTURE_SIZE)
        data = self._scratch[0]
        data.qpos[:] = self._physics[env, 1:3]
        self._mujoco.mj_forward(self._model, data)
        self._renderer.update_scene(data, "table")
        picture: NDArray[np.uint8] = self._renderer.render()
        return picture

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observed(self, ids: Ids) -> torch.Tensor:
        return torch.cat((self._desired[ids], _rod(self._physics[ids])), 1)


def _rod(physics: torch.Tensor) -> torch.Tensor:
    """The rod's position [..., 2] in physics states [..., 5]."""
    return cartesian(physics[..., [2, 1]])
