"""What a family of CPU environments implements; `ChunkEnv` makes a `VecEnv` of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dppo_fast.types import UserError

Array: TypeAlias = NDArray[Any]
Ids: TypeAlias = NDArray[np.int64]
"""Indices of some of the N envs, ascending."""


@dataclass(frozen=True)
class EnvConfig:
    """The environment of a run.

    ``id`` is a task of one of the backends (``Hopper-v4``), one of the reference's names (``hopper-medium-v2``), or
    ``package:Id``, where importing ``package`` registers ``Id`` with gymnasium. ``normalization`` is the path of a
    normalization file, ``none`` or ``running``. ``num_threads`` 0 means one per core. ``time_limit_terminates`` reports
    time limits as terminations, as the reference's gym environments do.
    """

    id: str
    num_envs: int
    act_steps: int
    obs_steps: int = 1
    image_steps: int = 1
    backend: str = "auto"
    max_episode_steps: int = 1000
    normalization: str = "none"
    num_threads: int = 0
    time_limit_terminates: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "num_threads" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise UserError(f"env.{field.name}={value}: must be at least {least}")


class Simulator(Protocol):
    """N environments without a time limit, stepped one step at a time on any subset, in NumPy and in their own units.

    Observations are dicts: ``state`` [n, Do] floating point, cameras [n, C, H, W] uint8; rows follow ``ids``.
    Same seed, same numbers of resets, same actions since the last reset: same state, however the envs were grouped.
    """

    num_envs: int
    obs_shapes: Mapping[str, tuple[int, ...]]
    action_low: NDArray[np.float64]
    action_high: NDArray[np.float64]

    def seed(self, seed: int, resets: Ids) -> None:
        """Let all randomness follow from ``seed``, as if env i had been reset ``resets[i]`` times since."""
        ...

    def reset(self, ids: Ids) -> dict[str, Array]:
        """Start a new episode in the envs ``ids``."""
        ...

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        """Apply ``actions`` [n, Da] to the envs ``ids``: observation, reward [n], terminated [n], truncated [n].

        An env that has ended is not stepped again before it is reset.
        """
        ...

    def close(self) -> None: ...
