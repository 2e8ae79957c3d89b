"""The reference's kitchen tasks, which are D4RL's, on EnvPool's Franka Kitchen: the same robot, objects and start.

The state [60] is D4RL's: positions of the robot (9) and of the objects (21), then the goal (30), which is zero but for
the four tasks' objects. Reward is the number of tasks newly completed, in any order; an episode terminates after the
fourth. Fu et al. 2020, arXiv 2004.07219; Gupta et al. 2019, arXiv 1910.11956.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dppo_fast.envs.envpool import EnvPoolSimulator
from dppo_fast.envs.simulator import Array, EnvConfig, require_options

ROBOT, OBJECTS = slice(0, 9), slice(18, 39)
"""Positions in EnvPool's observation, velocities left out."""

GOALS = {
    "bottom burner": (11, [-0.88, -0.01]),
    "light switch": (17, [-0.69, -0.05]),
    "slide cabinet": (19, [0.37]),
    "microwave": (22, [-0.75]),
    "kettle": (23, [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}
"""Where in the positions of robot and objects a task's are, and what they should become."""

SLIDER = ["microwave", "kettle", "light switch", "slide cabinet"]
TASKS = {
    "kitchen-complete-v0": SLIDER,
    "kitchen-partial-v0": SLIDER,
    "kitchen-mixed-v0": ["microwave", "kettle", "bottom burner", "light switch"],
}
NOISE = 0.1
"""D4RL's share of the noise that the robot's configuration gives."""


def task_ids() -> list[str]:
    return list(TASKS)


def make(task_id: str, config: EnvConfig) -> KitchenSimulator:
    return KitchenSimulator(task_id, config)


class KitchenSimulator(EnvPoolSimulator):
    def __init__(self, task_id: str, config: EnvConfig) -> None:
        require_options(config, [])
        noise = {"robot_noise_ratio": NOISE, "object_noise_ratio": NOISE}
        super().__init__("FrankaKitchen-v1", replace(config, options={"tasks_to_complete": TASKS[task_id], **noise}))
        self._goal = np.zeros(30)
        for start, goal in (GOALS[task] for task in TASKS[task_id]):
            self._goal[start : start + len(goal)] = goal
        self.obs_shapes = {"state": (60,)}

    def _read(self, obs: Array, rows: Array) -> dict[str, Array]:
        positions = obs["observation"][rows]
        goal = np.tile(self._goal, (len(rows), 1))
        return {"state": np.concatenate((positions[:, ROBOT], positions[:, OBJECTS], goal), 1)}
