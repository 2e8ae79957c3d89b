"""The tasks of robomimic (Mandlekar et al. 2021, arXiv 2108.03298), directly on robosuite 1.4.1, in worker processes.

``lift``, ``can``, ``square`` and ``transport`` with Panda arms; robomimic itself is not needed. An episode succeeds
while its reward is 1 and never ends before its time limit: 300, 300, 400 and 800 steps in the paper.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dppo_fast.envs.simulator import EnvConfig, read_options
from dppo_fast.envs.workers import WorkerSimulator
from dppo_fast.runtime.gl import headless_gl, require_gl
from dppo_fast.types import UserError

TASKS = {
    "lift": ("Lift", 1),
    "can": ("PickPlaceCan", 1),
    "square": ("NutAssemblySquare", 1),
    "transport": ("TwoArmTransport", 2),
}
"""Name -> robosuite's, and the number of arms."""

ROBOSUITE = "1.4.1"
MUJOCO = ((3, 1, 6), (4, 0))
"""The oldest and the newest series that it works with."""


@dataclass(frozen=True)
class RobomimicOptions:
    """``low_dim_keys`` make up the state, in this order; by default every arm's ``eef_pos``, ``eef_quat`` and
    ``gripper_qpos`` and, without ``cameras``, ``object``. ``image_size`` is height and width.
    """

    cameras: list[str] = field(default_factory=list)
    image_size: list[int] = field(default_factory=lambda: [96, 96])
    low_dim_keys: list[str] = field(default_factory=list)


def task_ids() -> list[str]:
    return list(TASKS)


def make(task_id: str, config: EnvConfig) -> WorkerSimulator:
    """Raises UserError where robosuite is missing, MuJoCo's version does not fit, there is no OpenGL for cameras, and
    for unknown cameras and keys.
    """
    options = read_options(RobomimicOptions, config)
    if len(options.image_size) != 2 or min(options.image_size) < 1:
        raise UserError(f"env.options.image_size={options.image_size}: must be [height, width]")
    _require_versions(task_id)
    if options.cameras:
        require_gl(f"env.options.cameras={options.cameras}", "egl", "osmesa")
    elif headless_gl() is None:
        os.environ["MUJOCO_GL"] = "glx"  # robosuite cannot be imported without any
    name, arms = TASKS[task_id]
    keys = [f"robot{i}_{key}" for i in range(arms) for key in ("eef_pos", "eef_quat", "gripper_qpos")]
    keys = options.low_dim_keys or keys + ([] if options.cameras else ["object"])
    env = partial(_make_env, name, arms, keys, options.cameras, options.image_size)
    return WorkerSimulator(task_id, env, config.num_envs, config.num_threads, ["dppo_fast.envs.robosuite"])


def _make_env(*arguments: Any) -> Any:
    """Runs in a worker: this process need not import robosuite."""
    from dppo_fast.envs.robosuite import RobosuiteEnv

    return RobosuiteEnv(*arguments)


def _require_versions(task_id: str, installed: Callable[[str], str] = version) -> None:
    install = "pip install 'dppo-fast[robomimic]'"
    try:
        robosuite, mujoco = installed("robosuite"), installed("mujoco")
    except PackageNotFoundError as error:
        raise UserError(f"env.id={task_id}: {error.name} is not installed: {install}") from error
    if robosuite != ROBOSUITE:
        raise UserError(f"env.id={task_id}: robosuite is {robosuite}, needed is {ROBOSUITE}: {install}")
    numbers = tuple(map(int, re.findall(r"\d+", mujoco)[:3]))
    oldest, newest = MUJOCO
    if not (oldest <= numbers and numbers[:2] <= newest):
        raise UserError(f"env.id={task_id}: mujoco is {mujoco}, needed is one from 3.1.6 to 4.0: {install}")
