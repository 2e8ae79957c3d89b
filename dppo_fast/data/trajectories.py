"""Demonstrations in the reference's npz format, the windows that training draws from them, a recorder for new ones.

Letters besides the package's: M steps of all trajectories together, E trajectories, L steps of one, H horizon.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dppo_fast.envs.normalize import MinMax
from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import Obs, ObsShapes, UserError

# key -> dtype and shape
_LAYOUT: dict[str, tuple[np.dtype[Any], str]] = {
    "states": (np.dtype(np.float32), "[steps, state dim]"),
    "actions": (np.dtype(np.float32), "[steps, action dim]"),
    "traj_lengths": (np.dtype(np.int64), "[trajectories]"),
    "rewards": (np.dtype(np.float32), "[steps]"),
    "terminals": (np.dtype(np.bool_), "[steps]"),
    "images": (np.dtype(np.uint8), "[steps, channels, height, width]"),
}
_REQUIRED = ("states", "actions", "traj_lengths")


@dataclass(eq=False)
class Trajectories:
    """Demonstrations, one trajectory after the other; a length of L means L states and the L actions taken there.

    ``states`` [M, Do] and ``actions`` [M, Da] float32, normalised to [-1, 1]; ``traj_lengths`` [E] int64; where known
    ``rewards`` [M] float32 (not normalised), ``terminals`` [M] bool (true ends only, no time limits) and ``images``
    [M, C, H, W] uint8. The arrays may come in other dtypes of the same values.

    Raises UserError for a wrong dtype or shape, no data, lengths that do not fit, and NaN or Inf.
    """

    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    traj_lengths: NDArray[np.int64]
    rewards: NDArray[np.float32] | None = None
    terminals: NDArray[np.bool_] | None = None
    images: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        arrays = {key: _checked(key, array) for key, array in self._arrays().items()}
        for key, array in arrays.items():
            setattr(self, key, array)
        steps, lengths = len(self.states), self.traj_lengths
        if steps == 0 or len(lengths) == 0:
            raise UserError(f"no data: states has {steps} rows, traj_lengths {len(lengths)}; at least one is needed")
        for key in arrays.keys() - {"traj_lengths"}:
            if len(arrays[key]) != steps:
                raise UserError(f"{key} has {len(arrays[key])} rows and states {steps}; both need one row per step")
        if lengths.min() < 1:
            empty = int(lengths.argmin())
            raise UserError(f"traj_lengths[{empty}]={lengths[empty]}: every trajectory needs at least one step")
        if lengths.sum() != steps:
            raise UserError(f"traj_lengths adds up to {lengths.sum()}, states has {steps} rows; they must be equal")

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        """Read an npz file; a warning tells when the actions leave [-1, 1]. Images that are not compressed stay in the
        file until they are looked at.

        Raises UserError, naming the file, when it is missing, damaged, pickled, lacks a key, or holds wrong data.
        """
        path = Path(path)
        try:
            trajectories = cls(**read_arrays(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        largest = float(np.abs(trajectories.actions).max())
        if largest > 1.001:
            warnings.warn(f"{path}: actions reach {largest:.4g}; they should be normalised to [-1, 1]", stacklevel=2)
        return trajectories

    def save(self, path: str | Path, *, compressed: bool = True) -> None:
        """Write the npz file that ``load`` and the reference read; the same data gives the same bytes."""
        write: Any = np.savez_compressed if compressed else np.savez
        with atomic_write(Path(path)) as file:
            write(file, **self._arrays())

    def first(self, episodes: int | None) -> Trajectories:
        """The first ``episodes`` trajectories, at least 1; all of them with None."""
        if episodes is None:
            return self
        lengths = self.traj_lengths[:episodes]
        arrays = {key: array[: lengths.sum()] for key, array in self._arrays().items()}
        return Trajectories(**{**arrays, "traj_lengths": lengths})

    @property
    def state_dim(self) -> int:
        return int(self.states.shape[1])

    @property
    def action_dim(self) -> int:
        return int(self.actions.shape[1])

    @property
    def returns(self) -> NDArray[np.float64] | None:
        """Undiscounted return of every trajectory, [E]; None without rewards."""
        if self.rewards is None:
            return None
        first = np.cumsum(self.traj_lengths) - self.traj_lengths
        return np.add.reduceat(self.rewards.astype(np.float64), first)

    def describe(self) -> dict[str, float]:
        """Episodes, steps, mean length; with rewards the returns' mean, deviation, 10th and 90th percentile."""
        summary = {
            "episodes": len(self.traj_lengths),
            "steps": len(self.states),
            "length_mean": float(self.traj_lengths.mean()),
        }
        if (returns := self.returns) is not None:
            low, high = np.quantile(returns, [0.1, 0.9])
            summary |= {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
            summary |= {"return_p10": float(low), "return_p90": float(high)}
        return summary

    def _arrays(self) -> dict[str, NDArray[Any]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: array for key, array in values.items() if array is not None}


def read_arrays(path: Path) -> Mapping[str, NDArray[Any]]:
    """The arrays that ``Trajectories`` knows, unchecked, without ever unpickling; see `Trajectories.load`."""
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(
            "a pickle is not loaded, because unpickling runs code; "
            "python -m dppo_fast.data.convert reference source=<file> out=<folder> makes an npz of it"
        )
    if not path.is_file():
        raise UserError("no such file; give the path of an .npz with states, actions and traj_lengths")
    if not zipfile.is_zipfile(path):
        raise UserError("not an npz file, or cut off; it must be written by np.savez or np.savez_compressed")
    key, arrays = "the table of contents", {}
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
            for key in filter(found.__contains__, _LAYOUT):
                with archive.open(f"{key}.npy") as member:
                    mapped = _mapped(path, archive.getinfo(member.name)) if key == "images" else None
                    if mapped is not None:
                        arrays[key] = mapped
                        while member.read(2**24):
                            pass
                        continue
                    arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):  # at the end zipfile compares the checksum
                        raise ValueError("more bytes than its shape needs")
    except Exception as error:  # damaged bytes make zipfile, its decompressors and NumPy raise a dozen unrelated types
        if "Object arrays" in str(error):
            raise UserError(f"{key} is pickled, and unpickling runs code; save it as an array of numbers") from error
        raise UserError(f"{key} is damaged ({error}); copy or make the file again") from error
    if missing := [key for key in _REQUIRED if key not in arrays]:
        raise UserError(f"key {missing[0]!r} is missing; needed are {', '.join(_REQUIRED)}, found {', '.join(found)}")
    return arrays


def _mapped(path: Path, member: zipfile.ZipInfo) -> NDArray[Any] | None:
    """The array of an npz's member in the file itself; None where it is compressed, or of another kind than bytes."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # there the local header has the lengths of name and extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        start = file.tell()
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        header = file.tell() - start
        if fortran_order or dtype != np.uint8 or header + math.prod(shape) != member.file_size:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape)


def _checked(key: str, array: NDArray[Any]) -> NDArray[Any]:
    """``array`` in the layout's dtype, its values unchanged but for rounding to float32."""
    dtype, shape = _LAYOUT[key]
    array = np.asarray(array)
    if array.ndim != shape.count(",") + 1:
        raise UserError(f"{key} has shape {list(array.shape)}; it must be {shape}")
    if 0 in array.shape[1:]:
        raise UserError(f"{key} has shape {list(array.shape)}; no dimension of {shape} may be 0")
    if array.dtype.kind not in "biuf":
        raise UserError(f"{key} has dtype {array.dtype}; it must be {dtype}")
    with np.errstate(all="ignore"):
        cast = array.astype(dtype, order="C", copy=False)
    if dtype.kind != "f" and array.dtype != dtype and not np.array_equal(cast, array):
        raise UserError(f"{key} is {array.dtype} with values that {dtype} cannot hold; it must be {dtype}")
    if dtype.kind == "f" and not (finite := np.isfinite(cast)).all():
        bad = np.flatnonzero(~finite.reshape(len(cast), -1).all(1))
        raise UserError(f"{key} has NaN or Inf in {len(bad)} of {len(cast)} rows, first in row {bad[0]}; remove them")
    return cast


class ChunkDataset:
    """Every window of H actions that lies inside one trajectory, with the last To observations at its first action.

    Before a trajectory's beginning its first observation repeats. ``start`` [len] is the row of a window's first step,
    ``since_start`` [len] that step's number in its trajectory. With ``image_steps`` the last so many images are
    observed as well, as ``rgb``. The arrays live on ``device``, where a batch is a few gathers; images stay where they
    are, and a batch of them is sent.

    Raises UserError when a size is below 1, the horizon is longer than every trajectory, or there are no images.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        horizon: int,
        obs_steps: int,
        device: torch.device | str = "cpu",
        image_steps: int | None = None,
    ) -> None:
        for key, value in {"horizon_steps": horizon, "cond_steps": obs_steps, "img_cond_steps": image_steps}.items():
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1")
        if image_steps is not None and trajectories.images is None:
            raise UserError(f"img_cond_steps={image_steps}: the data has no images; a network with vision needs them")
        lengths = torch.from_numpy(trajectories.traj_lengths)  # [E]
        longest = int(lengths.max())
        if horizon > longest:
            raise UserError(f"horizon_steps={horizon} is longer than every trajectory; at most {longest} fits")
        windows = (lengths - horizon + 1).clamp(min=0)
        since_start = torch.arange(int(windows.sum())) - (windows.cumsum(0) - windows).repeat_interleave(windows)
        start = (lengths.cumsum(0) - lengths).repeat_interleave(windows) + since_start

        self.device = torch.device(device)
        self.start = start.to(device)
        self.since_start = since_start.to(device)
        self._ahead = torch.arange(horizon, device=device)
        self._actions = torch.from_numpy(trajectories.actions).to(device)  # [M, Da]
        states = torch.from_numpy(trajectories.states).to(device)  # [M, Do]
        self._ages = {"state": torch.arange(obs_steps - 1, -1, -1, device=device)}  # of what is seen at once
        self._states = states
        if trajectories.images is not None and image_steps is not None:
            self._ages["rgb"] = torch.arange(image_steps - 1, -1, -1, device=device)
            self._images = trajectories.images

    def __len__(self) -> int:
        return len(self.start)

    @property
    def action_dim(self) -> int:
        return self._actions.shape[1]

    @property
    def obs_shapes(self) -> ObsShapes:
        """Name -> shape of one sample's observation, ``{"state": (To, Do)}`` and ``{"rgb": (To, C, H, W)}``."""
        return {
            name: (len(ages), *(self._states if name == "state" else self._images).shape[1:])
            for name, ages in self._ages.items()
        }

    def batch(self, indices: Tensor) -> tuple[Obs, Tensor]:
        """Observations ``{"state": [B, To, Do]}``, newest last, and actions [B, H, Da] of windows ``indices`` [B]."""
        indices = indices.to(self.device)
        start, since_start = self.start[indices, None], self.since_start[indices, None]  # [B, 1]
        rows = {name: start - torch.minimum(ages, since_start) for name, ages in self._ages.items()}  # [B, To]
        obs = {"state": self._states[rows["state"]]}
        if "rgb" in rows:
            obs["rgb"] = torch.from_numpy(self._images[rows["rgb"].cpu().numpy()]).to(self.device)
        return obs, self._actions[start + self._ahead]


def epoch_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A new permutation of n windows in pieces of ``batch_size``; the last piece may be shorter.

    All drawing is done at the call, so the generator's state from before it gives the same epoch again.
    Raises UserError when the batch size is below 1 or larger than the data.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    if batch_size > n:
        raise UserError(f"batch_size={batch_size} is larger than the {n} windows of the data; at most {n} is possible")
    return iter(torch.split(torch.randperm(n, generator=generator, device=generator.device), batch_size))


@dataclass(frozen=True, eq=False)
class Episode:
    """A finished episode in the env's own units: ``states`` [L, Do], ``actions`` [L, Da], ``rewards`` [L], float32.

    ``terminated`` is False where a time limit ended it.
    """

    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: bool

    @property
    def episode_return(self) -> float:
        """Undiscounted."""
        return float(self.rewards.sum(dtype=np.float64))


class TrajectoryRecorder:
    """Cuts the steps of N parallel envs into ``episodes``, in the order of their ends."""

    def __init__(self, num_envs: int) -> None:
        self.episodes: list[Episode] = []
        self._open: list[list[list[NDArray[np.float32]]]] = [[] for _ in range(num_envs)]

    def record(
        self,
        state: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None = None,
    ) -> list[Episode]:
        """Add one env step and give the episodes that it ended.

        ``action`` [N, Da] was taken in ``state`` [N, Do], both in the env's own units, and ``reward``, ``terminated``,
        ``truncated`` [N] came of it. An episode that ends where ``valid`` [N] is False (see ``types.Step``) is dropped.
        """
        copies = (np.array(values, np.float32) for values in (state, action, reward))  # envs may reuse their arrays
        for steps, *row in zip(self._open, *copies, strict=True):
            steps.append(row)
        finished = []
        for env in np.flatnonzero(terminated | truncated):
            if valid is None or valid[env]:
                states, actions, rewards = (np.stack(column) for column in zip(*self._open[env], strict=True))
                finished.append(Episode(states, actions, rewards, bool(terminated[env])))
            self._open[env] = []
        self.episodes += finished
        return finished

    def to_trajectories(
        self, min_return: float | None = None, max_return: float | None = None
    ) -> tuple[Trajectories, MinMax]:
        """The finished episodes with a return in [min_return, max_return], and the normalisation by their ranges.

        A policy trained on these trajectories needs an env with this normalisation. Raises UserError when none is left.
        """
        low = -math.inf if min_return is None else min_return
        high = math.inf if max_return is None else max_return
        kept = [episode for episode in self.episodes if low <= episode.episode_return <= high]
        if not kept:
            returns = [episode.episode_return for episode in self.episodes]
            found = f"the returns reach from {min(returns):.5g} to {max(returns):.5g}" if returns else "none has ended"
            raise UserError(f"min_return={min_return}, max_return={max_return} leave no episode; {found}")
        states = np.concatenate([episode.states for episode in kept])
        actions = np.concatenate([episode.actions for episode in kept])
        lengths = np.array([len(episode.rewards) for episode in kept])
        terminals = np.zeros(len(states), np.bool_)
        terminals[lengths.cumsum() - 1] = [episode.terminated for episode in kept]
        minmax = MinMax.from_data(states, actions)
        trajectories = Trajectories(
            states=minmax.normalize_obs(states).astype(np.float32),
            actions=minmax.normalize_action(actions).astype(np.float32),
            traj_lengths=lengths,
            rewards=np.concatenate([episode.rewards for episode in kept]),
            terminals=terminals,
        )
        return trajectories, minmax
