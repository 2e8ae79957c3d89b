"""Demonstrators for tasks of MetaWorld (Yu et al. 2019, arXiv 1910.10897): a hand that goes from place to place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dppo_fast.types import UserError

Array: TypeAlias = NDArray[np.float64]

HAND, OPENNESS, OBJECT, GOAL = slice(0, 3), 3, slice(4, 7), slice(36, 39)
"""Where observations have positions [x, y, z], in metres, and how far the gripper is open, 0 to 1."""

OPEN, CLOSED = -1.0, 1.0
GRASPED = 0.75
"""The gripper around an object is less open than this."""
GAIN = 20.0
"""Action per metre of error; an action of 1 moves the hand by 1 cm."""


@dataclass(frozen=True)
class Stage:
    """Go to ``offset`` from ``place``, and on to the next stage while the hand is as ``near`` as that, axis by axis, in
    metres; with ``grasps`` also not before the gripper has closed around something.
    """

    place: slice
    offset: tuple[float, float, float] = (0, 0, 0)
    near: tuple[float, float, float] = (np.inf, np.inf, np.inf)
    gripper: float = CLOSED
    grasps: bool = False


class MetaWorld:
    """Every action has Gaussian noise of standard deviation ``noise``, at most 1 in size; every episode's places are
    displaced by ``displacement`` metres (standard deviation), so that some fail.

    Its reward is 1 in a step in which the task is solved, else 0.
    """

    env: ClassVar[Mapping[str, Any]]
    stages: ClassVar[tuple[Stage, ...]]

    def __init__(self, num_envs: int, seed: int, noise: float = 0.3, displacement: float = 0.0) -> None:
        for name, value in {"noise": noise, "displacement": displacement}.items():
            if not 0 <= value < np.inf:
                raise UserError(f"{name}={value}: must lie in [0, inf)")
        self._seed, self._noise, self._displacement = seed, noise, displacement
        self._episodes = np.arange(num_envs)  # that each env runs next
        self._draws = [np.random.default_rng() for _ in range(num_envs)]
        self._displaced = np.zeros((num_envs, 3))

    def act(self, state: Array, first: NDArray[np.bool_]) -> Array:
        """Actions [N, 4], motion and gripper, for observations [N, 39]; ``first`` [N] marks new episodes."""
        for i in np.flatnonzero(first):
            self._draws[i] = np.random.default_rng([self._seed, self._episodes[i]])
            self._displaced[i] = self._displacement * self._draws[i].standard_normal(3)
            self._episodes[i] += len(self._episodes)
        action = np.zeros((len(state), 4))
        open_stages = np.ones(len(state), np.bool_)  # of the envs that have come this far
        for stage in self.stages:
            error = state[:, stage.place] + stage.offset + self._displaced - state[:, HAND]
            action[open_stages, :3] = (GAIN * error)[open_stages]
            action[open_stages, 3] = stage.gripper
            open_stages &= (np.abs(error) < stage.near).all(1)
            if stage.grasps:
                open_stages &= state[:, OPENNESS] < GRASPED
        noise = np.stack([draw.standard_normal(4) for draw in self._draws])
        clipped: Array = (action.clip(-1, 1) + self._noise * noise).clip(-1, 1)
        return clipped


def _task(name: str, steps: int) -> dict[str, Any]:
    options = {"partially_observable": False, "reward": "success"}
    return {"id": f"MetaWorld/{name}", "max_episode_steps": steps, "options": options}


class Reach(MetaWorld):
    env = _task("Reach-v3", 100)
    stages = (Stage(GOAL),)


class Push(MetaWorld):
    env = _task("Push-v3", 150)
    stages = (
        Stage(OBJECT, (0, 0, 0.15), (0.02, 0.02, np.inf), OPEN),
        Stage(OBJECT, (0, 0, 0.01), (0.02, 0.02, 0.05), OPEN),
        Stage(OBJECT, (0, 0, 0.01), (0.03, 0.03, 0.06), grasps=True),
        Stage(GOAL, (0, 0, 0.01)),
    )


class DrawerClose(MetaWorld):
    env = _task("DrawerClose-v3", 100)
    stages = (Stage(OBJECT, (0, -0.12, 0.02), (0.05, np.inf, 0.05)), Stage(OBJECT, (0, 0.1, 0.02)))


class ButtonPress(MetaWorld):
    env = _task("ButtonPress-v3", 100)
    stages = (Stage(OBJECT, (0, -0.15, 0), (0.03, np.inf, 0.04)), Stage(OBJECT, (0, 0.15, 0)))


class ButtonPressTopdown(MetaWorld):
    env = _task("ButtonPressTopdown-v3", 150)
    stages = (Stage(OBJECT, (0, 0, 0.12), (0.03, 0.03, np.inf)), Stage(OBJECT, (0, 0, -0.1)))


class CoffeeButton(MetaWorld):
    env = _task("CoffeeButton-v3", 100)
    stages = (Stage(OBJECT, (0, -0.15, 0), (0.03, np.inf, 0.03)), Stage(OBJECT, (0, 0.15, 0)))


class WindowOpen(MetaWorld):
    env = _task("WindowOpen-v3", 150)
    stages = (Stage(OBJECT, (-0.1, -0.05, 0.02), (np.inf, 0.05, 0.05)), Stage(OBJECT, (0.2, -0.02, 0.02)))


class WindowClose(MetaWorld):
    env = _task("WindowClose-v3", 150)
    stages = (Stage(OBJECT, (0.1, -0.05, 0.02), (np.inf, 0.05, 0.05)), Stage(OBJECT, (-0.2, -0.02, 0.02)))
