"""A demonstrator for D3IL avoid: several ways to pass the obstacles, and several demonstrations of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dppo_fast.envs.avoid_task import ACTION_HIGH, LINE_Y, MODES, START
from dppo_fast.types import UserError

Array: TypeAlias = NDArray[np.float64]
Mode: TypeAlias = tuple[int, ...]

SUBSETS: dict[str, tuple[Mode, ...]] = {
    "m1": ((1, 2, 5), (1, 2, 6)),
    "m2": ((1, 2, 5), (1, 2, 7)),
    "m3": ((1, 2, 5), (1, 2, 8)),
    "all": MODES,
}
"""Name -> the modes that its demonstrations show; from M1 to M3 they lie further and further apart."""

GATES = (0.42, 0.59, 0.345, 0.5, 0.655, 0.285, 0.425, 0.575, 0.715)
"""Of each side of the lines of obstacles, where along x it is passed."""
SPREAD = 0.012
SLOWEST = 0.8
"""How far gates vary, in metres, and paces, as shares of the fastest."""
FINISH = {5: 0.28, 6: 0.41, 7: 0.565, 8: 0.66}
"""Last side -> where along x the demonstration ends, at ``END_Y``."""
END_Y = 0.46


class Avoid:
    """Leads the desired position of N rods along smooth paths that vary at random, one mode of ``subset`` after the
    other from episode to episode. Raises UserError for an unknown subset.
    """

    env: ClassVar[Mapping[str, Any]] = {"id": "avoid", "max_episode_steps": 100}

    def __init__(self, num_envs: int, seed: int, subset: str = "all") -> None:
        if subset not in SUBSETS:
            raise UserError(f"subset={subset} is unknown; choose from {', '.join(SUBSETS)}")
        self._modes, self._seed = SUBSETS[subset], seed
        self._episodes = np.arange(num_envs)  # that each env runs next
        self._y = np.array([START[1], *LINE_Y, END_Y])
        self._x = np.zeros((num_envs, len(self._y)))
        self._pace = np.zeros(num_envs)

    def act(self, state: Array, first: NDArray[np.bool_]) -> Array:
        """Actions [N, 2] for observations [N, 4], in metres; ``first`` [N] marks new episodes."""
        for i in np.flatnonzero(first):
            self._begin(i)
        x, y = state[:, 0], state[:, 1]
        stride = self._pace * ACTION_HIGH[1]
        across = self._path(y + stride) - x
        slower = np.minimum(1, ACTION_HIGH[0] / np.maximum(np.abs(across), ACTION_HIGH[0]))
        up = np.where(y < END_Y, stride * slower, 0)
        return np.stack(((self._path(y + up) - x).clip(-ACTION_HIGH[0], ACTION_HIGH[0]), up), 1)

    def _begin(self, i: np.intp) -> None:
        episode = self._episodes[i]
        self._episodes[i] += len(self._episodes)
        mode = self._modes[episode % len(self._modes)]
        rng = np.random.default_rng([self._seed, episode])
        gates = np.array([*(GATES[side] for side in mode), FINISH[mode[-1]]])
        self._x[i] = [START[0], *(gates + rng.uniform(-SPREAD, SPREAD, gates.shape))]
        self._pace[i] = rng.uniform(SLOWEST, 1)

    def _path(self, y: Array) -> Array:
        """Where along x the paths are at heights ``y`` [N]: from gate to gate with level passages."""
        section = np.clip(np.searchsorted(self._y, y, side="right") - 1, 0, len(self._y) - 2)
        share = np.clip((y - self._y[section]) / np.diff(self._y)[section], 0, 1)
        smooth = share**2 * (3 - 2 * share)
        rows = np.arange(len(y))
        across: Array = self._x[rows, section] * (1 - smooth) + self._x[rows, section + 1] * smooth
        return across
