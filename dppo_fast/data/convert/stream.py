"""What every format gives, a stream of blocks of steps, and the one place that writes it.

The low-dimensional columns are gathered in memory, where training needs them too; images pass through block by block,
into a part of the npz that is not compressed, so that training maps it.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from omegaconf import MISSING

from dppo_fast.config import naming
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.envs.normalize import MinMax
from dppo_fast.runtime.files import atomic_write
from dppo_fast.runtime.progress import progress
from dppo_fast.types import UserError

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Consecutive steps of a trajectory in the source's units, the first ones where it ``starts``: ``states`` [L, Do],
    ``actions`` [L, Da], where known ``rewards`` [L], ``terminals`` [L] (true ends only) and ``images`` [L, C, H, W].
    """

    states: Array
    actions: Array
    rewards: Array | None = None
    terminals: Array | None = None
    images: Array | None = None
    starts: bool = True


@dataclass(frozen=True)
class Stream:
    """All ``steps`` of a source. ``action_low`` and ``action_high`` are the environment's bounds, where known.

    States and actions are ``raw``, or they are normalised already, by ``normalization`` if that is known.
    """

    steps: int
    blocks: Iterator[Block]
    action_low: ArrayLike | None = None
    action_high: ArrayLike | None = None
    raw: bool = True
    normalization: MinMax | None = None


@dataclass
class Conversion(ABC):
    """``train.npz`` and ``normalization.npz`` in the folder ``out`` from ``source``."""

    source: str = MISSING
    out: str = MISSING

    usage: ClassVar[str]
    """One line on the format, and what its keys mean."""

    @abstractmethod
    def open(self) -> AbstractContextManager[Stream]:
        """The source's steps, readable inside the ``with``. A source that is not as it should be is a UserError."""


def convert(conversion: Conversion) -> Trajectories:
    """Write both files, whole or not at all, report on them, and return the data without images.

    Raises UserError where the source is missing, damaged or not of this format, and where ``out`` is not writable.
    """
    out = Path(conversion.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / "train.npz") as file:
            with naming(f"source={conversion.source}"), conversion.open() as stream:
                trajectories, normalization = _write(stream, file)
            if normalization is not None:
                normalization.save(out / "normalization.npz")
    except OSError as error:
        raise UserError(f"out={out} is not writable ({error.strerror}); choose another folder") from error
    print("  ".join(f"{name} {value:.6g}" for name, value in trajectories.describe().items()))
    print(f"  {out / 'train.npz'}: {(out / 'train.npz').stat().st_size / 1e6:.1f} MB")
    if normalization is None:
        print("  No normalisation came with the data: give its file as env.normalization.")
    else:
        print(f"  {out / 'normalization.npz'}")
    return trajectories


def _write(stream: Stream, file: IO[bytes]) -> tuple[Trajectories, MinMax | None]:
    with zipfile.ZipFile(file, "w") as archive:
        columns = _gather(stream, archive)
        states, actions = columns["states"], columns["actions"]
        minmax = stream.normalization
        if stream.raw:
            _require_finite(states=states, actions=actions)
            minmax = MinMax.from_data(states, actions)
            columns["states"], columns["actions"] = minmax.normalize_obs(states), minmax.normalize_action(actions)
        trajectories = Trajectories(**columns)
        for key in columns:
            with archive.open(_compressed(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, getattr(trajectories, key), allow_pickle=False)
    _report_bounds(actions, stream)
    return trajectories, minmax


def _gather(stream: Stream, archive: zipfile.ZipFile) -> dict[str, Array]:
    """The low-dimensional columns; images go to the archive."""
    columns: dict[str, list[Array]] = defaultdict(list)
    lengths: list[int] = []
    images, shape, done = None, None, 0
    with ExitStack() as stack:
        converted = stack.enter_context(progress("converting", stream.steps))
        for block in stream.blocks:
            for key in ("states", "actions", "rewards", "terminals"):
                if (column := getattr(block, key)) is not None:
                    columns[key].append(column)
            if block.images is not None:
                if images is None:
                    shape = block.images.shape[1:]
                    images = stack.enter_context(archive.open("images.npy", "w", force_zip64=True))
                    _write_header(images, (stream.steps, *shape))
                if block.images.shape[1:] != shape:
                    raise UserError(f"images change from {shape} to {block.images.shape[1:]}; set image_size=[H, W]")
                images.write(np.ascontiguousarray(block.images).data)
            if block.starts:
                lengths.append(0)
            lengths[-1] += len(block.states)
            done += len(block.states)
            converted(done)
    if sum(lengths) != stream.steps:
        raise UserError(f"it says that it has {stream.steps} steps, and has {sum(lengths)}; copy it or make it again")
    if not lengths:
        raise UserError("it holds no steps")
    return {key: _concatenate(key, blocks) for key, blocks in columns.items()} | {"traj_lengths": np.array(lengths)}


def _write_header(member: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _compressed(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def _concatenate(key: str, blocks: Sequence[Array]) -> Array:
    if len(shapes := {block.shape[1:] for block in blocks}) > 1:
        raise UserError(f"{key} have different widths in different trajectories: {sorted(shapes)}")
    if kinds := {block.dtype for block in blocks if block.dtype.kind not in "biuf"}:
        raise UserError(f"{key} has dtype {kinds.pop()}; numbers are needed")
    return np.concatenate(blocks)


def _require_finite(**columns: Array) -> None:
    """Before normalisation, which would spread a NaN over its column."""
    for key, column in columns.items():
        if bad := np.flatnonzero(~np.isfinite(column).all(1)).tolist():
            raise UserError(f"{key} has NaN or Inf in {len(bad)} of {len(column)} rows, first in row {bad[0]}")


def _report_bounds(actions: Array, stream: Stream) -> None:
    """Say where actions leave the environment's bounds, which cuts them off."""
    if stream.action_low is None or stream.action_high is None:
        return
    excess = np.maximum(np.asarray(stream.action_low) - actions, actions - np.asarray(stream.action_high))
    if (rows := (excess > 1e-3).any(1)).any():
        dims = np.flatnonzero((excess > 1e-3).any(0)).tolist()
        print(
            f"warning: actions leave the environment's bounds in {rows.sum()} of {len(actions)} steps, by up to "
            f"{excess.max():.3g}, in dims {dims}; normalisation follows the data's own ranges"
        )


def require(module: str, extra: str = "data") -> Any:
    """An optional library. Raises UserError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"this format needs {module}: pip install 'dppo-fast[{extra}]'") from error
