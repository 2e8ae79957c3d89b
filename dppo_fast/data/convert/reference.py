"""The reference's own files: an npz or a pickle of a dict, with what `Trajectories` has."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import numpy as np

from dppo_fast.data.convert.images import Array, spans
from dppo_fast.data.convert.stream import Block, Conversion, Stream
from dppo_fast.data.pickles import read_pickle
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.envs.normalize import MinMax
from dppo_fast.types import UserError

LOW_DIM = ("states", "actions", "traj_lengths", "rewards", "terminals")

Images: TypeAlias = Callable[[int, int], Array]
"""First and last (exclusive) row, asked for in order -> images [last - first, C, H, W]."""


@dataclass
class Reference(Conversion):
    usage: ClassVar[str] = """The reference's train.npz or train.pkl, of which nothing is unpickled.

Its states and actions are normalised; normalization=<npz> is the file that they were normalised with, by default the
normalization.npz beside them. normalized=false is for raw ones, whose ranges are then taken. Compressed images come
out uncompressed, so that training maps them instead of loading them."""

    normalized: bool = True
    normalization: str | None = None

    @contextmanager
    def open(self) -> Iterator[Stream]:
        source = Path(self.source)
        if self.normalization is not None and not self.normalized:
            raise UserError(f"normalization={self.normalization} is for normalised data; remove normalized=false")
        with ExitStack() as stack:
            if source.suffix in (".pkl", ".pickle"):
                arrays, images = _of_pickle(source)
            else:
                arrays, images = _of_npz(source, stack)
            if missing := [key for key in LOW_DIM[:3] if key not in arrays]:
                raise UserError(f"key {missing[0]!r} is missing; found {', '.join(arrays) or 'nothing of use'}")
            data = Trajectories(**arrays)
            if self.normalized and (largest := float(np.abs(data.actions).max())) > 1.001:
                raise UserError(f"actions reach {largest:.4g}, so they are not normalised; set normalized=false")
            minmax = self._minmax(data) if self.normalized else None
            yield Stream(len(data.states), _blocks(data, images), raw=not self.normalized, normalization=minmax)

    def _minmax(self, data: Trajectories) -> MinMax | None:
        beside = Path(self.source).with_name("normalization.npz")
        file = self.normalization or (beside if beside.is_file() else None)
        return None if file is None else MinMax.load(file, data.state_dim, data.action_dim)


def _blocks(data: Trajectories, images: Images | None) -> Iterator[Block]:
    start = 0
    for length in data.traj_lengths.tolist():
        for first, last in spans(length, images is not None):
            now = slice(start + first, start + last)
            yield Block(
                data.states[now],
                data.actions[now],
                None if data.rewards is None else data.rewards[now],
                None if data.terminals is None else data.terminals[now],
                None if images is None else images(now.start, now.stop),
                starts=first == 0,
            )
        start += length


def _of_pickle(source: Path) -> tuple[dict[str, Array], Images | None]:
    content = read_pickle(source)
    if not isinstance(content, Mapping):
        raise UserError(f"it holds a {type(content).__name__}; a dict of arrays is needed")
    arrays = {key: np.asarray(content[key]) for key in LOW_DIM if key in content}
    if "images" not in content:
        return arrays, None
    images = np.asarray(content["images"])
    _require_images(images.shape, images.dtype)
    return arrays, lambda first, last: images[first:last]


def _of_npz(source: Path, stack: ExitStack) -> tuple[dict[str, Array], Images | None]:
    if not source.is_file():
        raise UserError("no such file")
    if not zipfile.is_zipfile(source):
        raise UserError("it is no npz file, or cut off")
    archive = stack.enter_context(zipfile.ZipFile(source))
    names = archive.namelist()
    arrays = {}
    for key in LOW_DIM:
        if f"{key}.npy" in names:
            with _damage(key), archive.open(f"{key}.npy") as member:
                arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
                member.read()  # at the end zipfile compares the checksum
    if "images.npy" not in names:
        return arrays, None
    return arrays, _of_member(stack.enter_context(archive.open("images.npy")))


def _of_member(member: IO[bytes]) -> Images:
    with _damage("images"):
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read_header[version](member)
    _require_images(shape, dtype)
    if fortran_order:
        raise UserError("images are in Fortran order; save them with np.ascontiguousarray")

    def read(first: int, last: int) -> Array:
        with _damage("images"):
            size = (last - first) * math.prod(shape[1:])
            return np.frombuffer(member.read(size), np.uint8).reshape(last - first, *shape[1:])

    return read


def _require_images(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 4 or dtype != np.uint8:
        raise UserError(f"images are {dtype} of shape {list(shape)}; they must be uint8 [steps, C, H, W]")


@contextmanager
def _damage(key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged bytes make zipfile, its decompressors and NumPy raise a dozen unrelated types
        if "Object arrays" in str(error):
            raise UserError(f"{key} is pickled, and unpickling runs code; save it as an array of numbers") from error
        raise UserError(f"{key} is damaged ({error}); copy or make the file again") from error
