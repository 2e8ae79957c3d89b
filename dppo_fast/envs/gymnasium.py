"""Plain gymnasium environments, one after the other in this process."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space
from numpy.typing import NDArray

from dppo_fast.envs.simulator import Array, EnvConfig, Ids
from dppo_fast.types import UserError


def task_ids() -> list[str]:
    """All registered environments."""
    return list(gymnasium.registry)


def make(task_id: str, config: EnvConfig) -> GymnasiumSimulator:
    return GymnasiumSimulator(task_id, config.num_envs)


class GymnasiumSimulator:
    """A `Simulator` of any id with Box actions, and a Box observation or a Dict of ``state`` and cameras, [C, H, W] or
    [H, W, C].
    """

    def __init__(self, task_id: str, num_envs: int) -> None:
        spec = gymnasium.spec(task_id)
        try:
            self._envs = [gymnasium.make(spec, disable_env_checker=True, max_episode_steps=-1) for _ in range(num_envs)]
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"env.id={task_id}: {error}") from error
        self.num_envs = num_envs
        self._action_dtype = self._envs[0].action_space.dtype
        self.obs_shapes, self.action_low, self.action_high = box_spaces(
            task_id, self._envs[0].observation_space, self._envs[0].action_space
        )

    def seed(self, seed: int, resets: Ids) -> None:
        """Each episode of each env has its own seed, so resets need not be repeated."""
        self._seed, self._resets = seed, resets.copy()

    def reset(self, ids: Ids) -> dict[str, Array]:
        rows = []
        for i in ids:
            episode = np.random.SeedSequence(self._seed, spawn_key=(i, self._resets[i]))
            rows.append(self._envs[i].reset(seed=int(episode.generate_state(1)[0]))[0])
            self._resets[i] += 1
        return self._stack(rows)

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        actions = actions.astype(self._action_dtype)
        steps = [self._envs[i].step(action) for i, action in zip(ids, actions, strict=True)]
        rows, *outcome, _ = zip(*steps, strict=True)
        reward, terminated, truncated = map(np.array, outcome)
        return self._stack(rows), reward, terminated, truncated

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _stack(self, rows: Any) -> dict[str, Array]:
        if not isinstance(rows[0], dict):
            return {"state": np.stack(rows)}
        obs = {name: np.stack([row[name] for row in rows]) for name in self.obs_shapes}
        return {name: np.moveaxis(x, -1, 1) if _channels_last(x.shape[1:]) else x for name, x in obs.items()}


def _channels_last(shape: tuple[int, ...]) -> bool:
    """Whether this is [H, W, C], and not [C, H, W]: an image has more pixels a side than channels."""
    return len(shape) == 3 and shape[2] < shape[0]


def box_spaces(
    task_id: str, observation_space: Space[Any], action_space: Space[Any]
) -> tuple[dict[str, tuple[int, ...]], NDArray[np.float64], NDArray[np.float64]]:
    """Observation shapes and action bounds [Da]. Raises UserError for spaces that a `Simulator` cannot have."""
    spaces = observation_space.spaces if isinstance(observation_space, Dict) else {"state": observation_space}
    for name, space in {"state": None, **spaces}.items():
        rank, kind = (1, "f") if name == "state" else (3, "u")
        if not isinstance(space, Box) or len(space.shape) != rank or space.dtype.kind != kind:
            raise UserError(
                f"env.id={task_id}: observation {name} is {space}; needed are state [Do] floating point and, "
                "where there are cameras, [C, H, W] or [H, W, C] uint8"
            )
    if not isinstance(action_space, Box) or len(action_space.shape) != 1:
        raise UserError(f"env.id={task_id}: actions are {action_space}; needed is a Box of shape [Da]")
    shapes = {name: tuple(space.shape or ()) for name, space in spaces.items()}
    shapes = {name: (shape[2], *shape[:2]) if _channels_last(shape) else shape for name, shape in shapes.items()}
    return shapes, action_space.low.astype(np.float64), action_space.high.astype(np.float64)
