"""Stand-ins for simulators and demonstrations that have the dims the reference states for a task, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from dppo_fast.data.trajectories import Trajectories
from dppo_fast.envs import EnvConfig
from dppo_fast.types import ObsShapes
from tests.configs.mapping import REFERENCE


class StatedEnv:
    """An environment to build from, not to step in."""

    normalization = None

    def __init__(self, name: str, config: EnvConfig) -> None:
        state, self.action_dim, images = _dims(name)
        self.num_envs, self.act_steps = config.num_envs, config.act_steps
        self.max_episode_steps = config.max_episode_steps
        self.obs_shapes: ObsShapes = {"state": (config.obs_steps, state)}
        if images is not None:
            self.obs_shapes = {**self.obs_shapes, "rgb": (config.image_steps, *images)}

    def close(self) -> None: ...


def stated_trajectories(name: str, steps: int = 300) -> Trajectories:
    """One episode of zeros."""
    state, action, images = _dims(name)
    arrays: dict[str, Any] = {
        "states": np.zeros((steps, state), np.float32),
        "actions": np.zeros((steps, action), np.float32),
        "traj_lengths": np.array([steps]),
        "rewards": np.zeros(steps, np.float32),
        "terminals": np.zeros(steps, np.bool_),
    }
    if images is not None:
        arrays["images"] = np.zeros((steps, *images), np.uint8)
    return Trajectories(**arrays)


def _dims(name: str) -> tuple[int, int, tuple[int, ...] | None]:
    """State, action, and where the policy sees them, images [C, H, W]."""
    values = REFERENCE[name]
    images = values.get("shape_meta.obs.rgb.shape")
    return values["obs_dim"], values["action_dim"], images and tuple(images)
