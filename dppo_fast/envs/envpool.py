"""EnvPool's C++ thread pool: MuJoCo locomotion, Franka Kitchen, MetaWorld, Adroit, Fetch and its other vector tasks."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dppo_fast.envs.gymnasium import Layout, action_bounds
from dppo_fast.envs.simulator import Array, EnvConfig, Ids, require_options
from dppo_fast.runtime.gl import expose_egl, require_gl
from dppo_fast.types import UserError

expose_egl()  # EnvPool looks for it when it is imported
import envpool  # noqa: E402

NO_LIMIT = np.iinfo(np.int32).max
PICTURE = {"render_mode": "rgb_array", "render_width": 256, "render_height": 256}
OURS = {"num_envs", "num_threads", "env_seed", "max_episode_steps"}
"""Settings of a pool that follow from the rest of the configuration."""


def task_ids() -> list[str]:
    """All tasks that this installation of EnvPool knows."""
    return list(envpool.list_all_envs())


def make(task_id: str, config: EnvConfig) -> EnvPoolSimulator:
    return EnvPoolSimulator(task_id, config)


class EnvPoolSimulator:
    """A `Simulator` whose results do not depend on ``num_threads`` (0: one per core).

    ``options`` are EnvPool's settings of this task, and ``reward``: ``task`` (the default), or ``success``, which is 1
    in every step in which the task counts as solved and 0 in the others, for tasks that tell.
    """

    def __init__(self, task_id: str, config: EnvConfig) -> None:
        self._options = dict(config.options)
        reward = self._options.pop("reward", "task")
        settings = envpool.make_spec(task_id).config._fields
        require_options(config, ["reward", *sorted(set(settings) - OURS)])
        try:
            spec = envpool.make_spec(task_id, **self._options)
        except TypeError as error:
            raise UserError(f"env.options={self._options}: {task_id} does not take these values") from error
        told = [name for name in ("success", "is_success") if f"info:{name}" in spec._state_keys]
        self._success = told[0] if told and reward == "success" else None
        if reward != "task" and self._success is None:
            raise UserError(f"env.options.reward={reward}: choose task" + (" or success" if told else ""))
        self.num_envs = config.num_envs
        self._layout = Layout(task_id, spec.gymnasium_observation_space)
        self.obs_shapes = self._layout.shapes
        self.action_low, self.action_high = action_bounds(task_id, spec.gymnasium_action_space)
        self._task_id = task_id
        self._num_threads = config.num_threads
        self._pool: Any = None

    def seed(self, seed: int, resets: Ids) -> None:
        """Make a new pool, as EnvPool seeds only then. The seed of env i does not depend on the number of envs."""
        seeds = np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1  # EnvPool reads them as int32
        self._pool = envpool.make_gymnasium(
            self._task_id,
            num_envs=self.num_envs,
            num_threads=self._num_threads,
            env_seed=seeds.tolist(),
            max_episode_steps=NO_LIMIT,
            **self._options,
            **PICTURE,
        )
        for count in range(resets.max()):
            self.reset(np.flatnonzero(resets > count))

    def reset(self, ids: Ids) -> dict[str, Array]:
        obs, info = self._pool.reset(ids.astype(np.int32))
        return self._read(obs, np.argsort(info["env_id"]))

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        obs, reward, terminated, truncated, info = self._pool.step(actions, ids)
        if self._success is not None:
            reward = info[self._success]
        rows = np.argsort(info["env_id"])
        return self._read(obs, rows), reward[rows], terminated[rows], truncated[rows]

    def render(self, env: int) -> NDArray[np.uint8]:
        require_gl(f"env.id={self._task_id} (EnvPool)", "egl")
        picture: NDArray[np.uint8] = self._pool.render(np.array([env], np.int32))[0]
        return picture

    def close(self) -> None:
        self._pool = None

    def _read(self, obs: Any, rows: NDArray[np.intp]) -> dict[str, Array]:
        return self._layout.read(lambda leaf: reduce(getitem, leaf, obs)[rows])
