"""EnvPool's C++ thread pool: MuJoCo locomotion and every other of its tasks with vector observations."""

from __future__ import annotations

from typing import Any

import envpool
import numpy as np
from numpy.typing import NDArray

from dppo_fast.envs.gymnasium import box_spaces
from dppo_fast.envs.simulator import Array, EnvConfig, Ids

NO_LIMIT = np.iinfo(np.int32).max


def task_ids() -> list[str]:
    """All tasks that this installation of EnvPool knows."""
    return list(envpool.list_all_envs())


def make(task_id: str, config: EnvConfig) -> EnvPoolSimulator:
    return EnvPoolSimulator(task_id, config.num_envs, config.num_threads)


class EnvPoolSimulator:
    """A `Simulator` whose results do not depend on ``num_threads`` (0: one per core)."""

    def __init__(self, task_id: str, num_envs: int, num_threads: int = 0) -> None:
        spec = envpool.make_spec(task_id)
        self.num_envs = num_envs
        self.obs_shapes, self.action_low, self.action_high = box_spaces(
            task_id, spec.gymnasium_observation_space, spec.gymnasium_action_space
        )
        self._task_id = task_id
        self._num_threads = num_threads
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
        )
        for count in range(resets.max()):
            self.reset(np.flatnonzero(resets > count))

    def reset(self, ids: Ids) -> dict[str, Array]:
        obs, info = self._pool.reset(ids.astype(np.int32))
        return {"state": obs[np.argsort(info["env_id"])]}

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        obs, reward, terminated, truncated, info = self._pool.step(actions, ids)
        rows = np.argsort(info["env_id"])
        return {"state": obs[rows]}, reward[rows], terminated[rows], truncated[rows]

    def close(self) -> None:
        self._pool = None
