"""Lift's cube taken and lifted by the position of the hand and of the cube, in two ways and not always well."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

APPROACH, LOWER, CLOSE, LIFT = range(4)
CLOSING_STEPS = 8
GAIN = 12.0
"""Action per metre that is missing; an action of 1 moves the hand's target by 0.05 m."""


class Lift:
    """Go near the cube, down to it, close the gripper, lift. An episode draws one of two ways: from above, fast, or low
    from the side of the robot, slowly.

    The hand aims at ``noise`` metres (standard deviation) beside the cube and closes there, whatever is between the
    fingers, and does not try again. ``jitter`` is the standard deviation of what is added to its motions.
    """

    env: ClassVar[dict[str, Any]] = {"id": "lift", "max_episode_steps": 300}

    def __init__(self, num_envs: int, seed: int, noise: float = 0.015, jitter: float = 0.1) -> None:
        self.noise, self.jitter = noise, jitter
        self._rng = np.random.default_rng(seed)
        self._phase, self._waited = np.zeros((2, num_envs), np.int64)
        self._aim, self._way = np.zeros((2, num_envs, 3))  # where to close, and where to come from
        self._speed = np.zeros(num_envs)

    def act(self, state: NDArray[np.float64], first: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Actions [N, 7] for the states [N, 19] of Lift: hand's position 0-2, cube's 9-11."""
        hand, cube = state[:, :3], state[:, 9:12]
        if n := int(first.sum()):
            low = self._rng.random(n) < 0.5
            self._aim[first] = cube[first] + self._rng.normal(size=(n, 3)) * [self.noise, self.noise, 0]
            self._way[first] = self._aim[first] + np.where(low[:, None], [-0.08, 0.0, 0.05], [0.0, 0.0, 0.1])
            self._speed[first] = np.where(low, 0.5, 1.0)
            self._phase[first] = APPROACH
            self._waited[first] = 0
        lifted = self._aim + np.array([0.0, 0.0, 0.15])
        target = np.choose(self._phase[:, None], [self._way, self._aim, self._aim, lifted])
        missing = target - hand
        near = np.linalg.norm(missing, axis=1) < 0.015
        self._waited += self._phase == CLOSE
        self._phase += (near & (self._phase < CLOSE)) | ((self._phase == CLOSE) & (self._waited >= CLOSING_STEPS))
        action = np.zeros((len(state), 7))
        bound = self._speed[:, None]
        action[:, :3] = (GAIN * missing).clip(-bound, bound) + self.jitter * self._rng.normal(size=missing.shape)
        action[:, 6] = np.where(self._phase >= CLOSE, 1.0, -1.0)
        return action.clip(-1, 1)
