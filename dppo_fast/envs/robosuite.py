"""One robosuite 1.4.1 environment with gymnasium's interface, for the workers of `dppo_fast.envs.robomimic`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box, Dict
from numpy.typing import NDArray

from dppo_fast.envs.simulator import Array
from dppo_fast.types import UserError

# at every import it misses a file of private settings, and what it refuses it tells twice
logging.getLogger("robosuite_logs").addFilter(
    lambda record: record.levelno < logging.ERROR and "macro" not in record.getMessage()
)

import robosuite  # noqa: E402
from robosuite.controllers import base_controller  # noqa: E402
from robosuite.utils import binding_utils  # noqa: E402

CONTROLLER = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}
"""Changes of the end effector's pose, in metres and radians of axis and angle, held by a critically damped spring."""

PICTURE = (256, 256)
"""Height and width of what ``render`` draws."""


class RobosuiteEnv(gymnasium.Env[dict[str, Array], NDArray[np.float64]]):
    """A task as in robomimic's datasets: OSC_POSE at 20 Hz, sparse reward in {0, 1}, never over.

    Observations are ``state``, the ``low_dim_keys`` one after the other, ``object`` being robosuite's ``object-state``,
    and with ``cameras`` ``rgb`` [3 cameras, H, W], upright. What differs from model to model, such as the size of
    Lift's cube, follows from ``seed``.
    """

    def __init__(
        self,
        name: str,
        arms: int,
        low_dim_keys: Sequence[str],
        cameras: Sequence[str] = (),
        size: Sequence[int] = (96, 96),
        seed: int = 0,
    ) -> None:
        settings: dict[str, Any] = {"env_configuration": "single-arm-opposed"} if arms > 1 else {}
        if cameras:
            settings |= {"camera_names": list(cameras), "camera_heights": size[0], "camera_widths": size[1]}
        np.random.seed(seed)  # noqa: NPY002  robosuite draws from NumPy's global generator
        try:
            self._env = robosuite.make(
                name,
                robots=["Panda"] * arms,
                controller_configs=CONTROLLER,
                control_freq=20,
                reward_shaping=False,
                ignore_done=True,
                hard_reset=False,
                has_renderer=False,
                has_offscreen_renderer=bool(cameras),
                use_camera_obs=bool(cameras),
                **settings,
            )
        except ValueError as error:
            raise UserError(f"env.options.cameras={list(cameras)}: {error.__context__ or error}") from error
        self._keys = ["object-state" if key == "object" else key for key in low_dim_keys]
        self._cameras = list(cameras)
        self._renderer: mujoco.Renderer | None = None
        known = {key: shape for key, shape in self._env.observation_spec().items() if not key.endswith("_image")}
        if unknown := [key for key in self._keys if key not in known]:
            choices = ", ".join(sorted(known)).replace("object-state", "object")
            raise UserError(f"env.options.low_dim_keys: {name} has no {', '.join(unknown)}; choose from {choices}")
        state = self._observe(self._env.reset())["state"]
        spaces: dict[str, Any] = {"state": Box(-np.inf, np.inf, state.shape, np.float64)}
        if cameras:
            spaces["rgb"] = Box(0, 255, (3 * len(cameras), *size), np.uint8)
        self.observation_space: Dict[Any] = Dict(spaces)  # type: ignore[assignment]
        self.action_space = Box(*self._env.action_spec, dtype=np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002
        self._use_own_context()
        return self._observe(self._env.reset()), {}

    def step(self, action: NDArray[np.float64]) -> tuple[dict[str, Array], float, bool, bool, dict[str, Any]]:
        self._use_own_context()
        obs, reward, _, _ = self._env.step(action)
        return self._observe(obs), float(reward), False, False, {}

    def render(self) -> NDArray[np.uint8]:
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self._env.sim.model._model, *PICTURE)
            self._looks = mujoco.MjvOption()
            self._looks.geomgroup[0] = 0  # what bodies collide with
        self._renderer.update_scene(self._env.sim.data._data, "agentview", self._looks)
        picture: NDArray[np.uint8] = self._renderer.render()
        return picture

    def close(self) -> None:
        self._env.close()

    def _use_own_context(self) -> None:
        """robosuite draws in whichever OpenGL context is current, and several envs of a process have one each."""
        if self._cameras:
            self._env.sim._render_context_offscreen.gl_ctx.make_current()

    def _observe(self, obs: dict[str, Array]) -> dict[str, Array]:
        observed = {"state": np.concatenate([np.atleast_1d(obs[key]) for key in self._keys])}
        if self._cameras:
            upright = [obs[f"{camera}_image"][::-1] for camera in self._cameras]
            observed["rgb"] = np.concatenate(upright, -1).transpose(2, 0, 1)
        return observed


def _joint_address(field: str, widths: dict[int, int]) -> Callable[[Any, str], Any]:
    def address(model: Any, joint: str) -> Any:
        index = model.joint_name2id(joint)
        start, width = getattr(model, field)[index], widths.get(int(model.jnt_type[index]), 1)
        return start if width == 1 else (start, start + width)

    return address


def _full_mass_matrix(model: Any, matrix: Array, data: Any) -> None:
    mujoco.mj_fullM(model, data, matrix)


if not hasattr(mujoco.MjData, "qM"):  # since MuJoCo 3.10, where enums are not equal to NumPy's integers either
    binding_utils.MjModel.get_joint_qpos_addr = _joint_address("jnt_qposadr", {0: 7, 1: 4})  # free, ball
    binding_utils.MjModel.get_joint_qvel_addr = _joint_address("jnt_dofadr", {0: 6, 1: 3})
    binding_utils.MjData.qM = property(lambda data: data._data)
    base_controller.mujoco = SimpleNamespace(mj_fullM=_full_mass_matrix)
