"""Between the simulator's units and the policy's: observations to about [-1, 1], actions from [-1, 1]."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError


class Normalization(ABC):
    """Maps raw observations [..., Do] to the policy's, and the policy's actions [..., Da] to raw ones, in float64.

    Actions are not clipped. The arrays named in ``fields`` are its whole state.
    """

    fields: ClassVar[tuple[str, ...]] = ("action_min", "action_max")

    def __init__(self, action_min: ArrayLike, action_max: ArrayLike) -> None:
        self.action_min = np.asarray(action_min, np.float64)
        self.action_max = np.asarray(action_max, np.float64)

    @abstractmethod
    def normalize_obs(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        """Raw observations in the policy's units."""

    def unnormalize_action(self, action: NDArray[Any]) -> NDArray[np.float64]:
        """``(a + 1) / 2 * (max - min) + min``."""
        return (action.astype(np.float64) + 1) / 2 * (self.action_max - self.action_min) + self.action_min

    def update(self, raw: NDArray[Any]) -> None:  # noqa: B027
        """Learn from raw observations [N, Do]: what `Running` does, and the others do not."""

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self, name)) for name in self.fields}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state. Raises UserError where it is another kind's or has other sizes."""
        if set(state) != set(self.fields):
            raise UserError(f"env.normalization: the saved state holds {sorted(state)}, expected {sorted(self.fields)}")
        arrays = {name: value.cpu().numpy().copy() for name, value in state.items()}
        for name, array in arrays.items():
            if array.shape != (expected := getattr(self, name).shape):
                raise UserError(f"env.normalization: the saved {name} has shape {array.shape}, expected {expected}")
        vars(self).update(arrays)


class Identity(Normalization):
    """Observations as they are, actions from [-1, 1] to the simulator's bounds."""

    def normalize_obs(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        return raw.astype(np.float64)


class Running(Normalization):
    """Observations by their running mean and variance, clipped to +-10, for training without demonstrations.

    Batches are merged by the parallel form of Welford's sums (Chan, Golub, LeVeque 1979).
    """

    fields = (*Normalization.fields, "mean", "variance", "count")

    def __init__(self, action_min: ArrayLike, action_max: ArrayLike, obs_dim: int) -> None:
        super().__init__(action_min, action_max)
        self.mean = np.zeros(obs_dim)
        self.variance = np.ones(obs_dim)
        self.count = np.array(1e-4)

    def normalize_obs(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = (raw - self.mean) / np.sqrt(self.variance + 1e-8)
        return scaled.clip(-10, 10)

    def update(self, raw: NDArray[Any]) -> None:
        count = self.count + len(raw)
        delta = raw.mean(0) - self.mean
        squares = self.variance * self.count + raw.var(0) * len(raw) + delta**2 * self.count * len(raw) / count
        self.mean = self.mean + delta * len(raw) / count
        self.variance = squares / count
        self.count = count


class MinMax(Normalization):
    """``2 ((o - min) / (max - min + epsilon) - 0.5)``: the ranges of demonstrations map to [-1, 1].

    Its file is the reference's: an npz with obs_min, obs_max [Do], action_min, action_max [Da].
    """

    fields = (*Normalization.fields, "obs_min", "obs_max")

    def __init__(
        self,
        obs_min: ArrayLike,
        obs_max: ArrayLike,
        action_min: ArrayLike,
        action_max: ArrayLike,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__(action_min, action_max)
        self.obs_min = np.asarray(obs_min, np.float64)
        self.obs_max = np.asarray(obs_max, np.float64)
        self.epsilon = epsilon

    @classmethod
    def from_data(cls, states: NDArray[Any], actions: NDArray[Any], epsilon: float = 1e-6) -> Self:
        """The ranges of raw states [..., Do] and actions [..., Da]; a column without spread is widened by +-1."""
        return cls(*_range(states), *_range(actions), epsilon=epsilon)

    @classmethod
    def load(cls, path: str | os.PathLike[str], obs_dim: int, action_dim: int) -> Self:
        """Read a normalization file. Raises UserError, naming file and key, where it does not fit or holds nonsense."""
        sizes = {"obs_min": obs_dim, "obs_max": obs_dim, "action_min": action_dim, "action_max": action_dim}
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays: dict[str, Any] = {key: np.asarray(file[key]) for key in sizes if key in file}
        except FileNotFoundError:
            raise UserError(f"env.normalization={path}: no such file; give an npz file, none or running") from None
        except Exception as error:  # damaged bytes make zipfile, its decompressors and NumPy raise a dozen types
            raise UserError(f"env.normalization={path}: not a readable npz file ({error})") from error
        if missing := sizes.keys() - arrays.keys():
            raise UserError(f"env.normalization={path}: lacks {', '.join(sorted(missing))}")
        for key, array in arrays.items():
            if array.shape != (sizes[key],):
                raise UserError(f"env.normalization={path}: {key} has shape {array.shape}, expected ({sizes[key]},)")
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise UserError(f"env.normalization={path}: {key} holds something other than finite numbers")
        for kind in ("obs", "action"):
            if bad := np.flatnonzero(arrays[f"{kind}_min"] > arrays[f"{kind}_max"]).tolist():
                raise UserError(f"env.normalization={path}: {kind}_min exceeds {kind}_max in columns {bad}")
        return cls(**arrays)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `load` reads; a reader never sees half of it."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in self.fields}
        with atomic_write(Path(path)) as file:
            np.savez(file, **arrays)

    def normalize_obs(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        return self._normalize(raw, self.obs_min, self.obs_max)

    def normalize_action(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        """Raw actions of demonstrations [..., Da] in the policy's units."""
        return self._normalize(raw, self.action_min, self.action_max)

    def _normalize(self, raw: NDArray[Any], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = 2 * ((raw - low) / (high - low + self.epsilon) - 0.5)
        return scaled


class BoundedMinMax(MinMax):
    """As MinMax, but observations end at +-``bound``, and the ranges are taken as they are: FurnitureBench's."""

    fields = (*MinMax.fields, "bound")

    def __init__(
        self,
        obs_min: ArrayLike,
        obs_max: ArrayLike,
        action_min: ArrayLike,
        action_max: ArrayLike,
        epsilon: float = 0.0,
        bound: ArrayLike = 5.0,
    ) -> None:
        super().__init__(obs_min, obs_max, action_min, action_max, epsilon)
        self.bound = np.asarray(bound, np.float64)

    def normalize_obs(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        return super().normalize_obs(raw).clip(-self.bound, self.bound)


def _range(data: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = data.reshape(-1, data.shape[-1]).astype(np.float64)
    low, high = rows.min(0), rows.max(0)
    spread = (low == high).astype(np.float64)
    return low - spread, high + spread


def normalization_from_state(state: Mapping[str, Tensor]) -> Normalization:
    """The normalisation whose ``state_dict`` this is. Raises UserError where it is of none."""
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in state.items()}
    for kind in (Identity, MinMax, BoundedMinMax):
        if set(arrays) == set(kind.fields):
            return kind(**arrays)
    if set(arrays) == set(Running.fields):
        running = Running(arrays["action_min"], arrays["action_max"], len(arrays["mean"]))
        running.load_state_dict(dict(state))
        return running
    raise UserError(f"a saved normalisation holds {sorted(arrays)}, which is of no known kind")
