"""Reading HDF5; every fault of a file names what it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dppo_fast.data.convert.stream import require
from dppo_fast.types import UserError

FAULTS = KeyError, OSError, RuntimeError, TypeError, ValueError
"""What h5py raises where a file's bytes are damaged."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, for reading. Raises UserError where it is missing or no HDF5, or h5py is."""
    h5py = require("h5py")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path.name} is not a readable HDF5 file, or is cut off ({error})") from error
    with file:
        yield file


def child(group: Any, key: str) -> Any:
    """``group[key]``. Raises UserError where it is absent."""
    try:
        return group[key]
    except FAULTS as error:
        raise UserError(f"{group.name} has no readable {key!r}; it holds {_names(group)}") from error


def _names(group: Any) -> str:
    try:
        return ", ".join(sorted(map(str, group))) or "nothing"
    except FAULTS:
        return "nothing that can be listed"


def rows(group: Any, key: str, first: int = 0, last: int | None = None, dims: int | None = None) -> NDArray[Any]:
    """Rows of a table of numbers. Raises UserError where it is absent, damaged, too short, or has not ``dims`` dims."""
    table = child(group, key)
    try:
        is_table = hasattr(table, "dtype") and hasattr(table, "ndim")
    except FAULTS as error:
        raise UserError(f"{table.name} holds what NumPy has no type for: {error}") from error
    if not is_table:
        raise UserError(f"{table.name} is a group, of {_names(table)}; a table is needed")
    if dims is not None and table.ndim != dims:
        raise UserError(f"{table.name} has shape {list(table.shape)}; it must have {dims} dims")
    try:
        values = np.asarray(table[first:last])
    except FAULTS as error:
        raise UserError(f"{table.name} is damaged: {error}") from error
    if last is not None and len(values) != last - first:
        raise UserError(f"{table.name} has {table.shape[0]} rows, and needs {last} or more")
    return values


def length(group: Any, key: str) -> int:
    """How many rows a table has."""
    shape = getattr(child(group, key), "shape", ())
    if not shape:
        raise UserError(f"{group.name}/{key} is no table")
    return int(shape[0])


def joined(group: Any, keys: Sequence[str], first: int, last: int) -> NDArray[Any]:
    """The columns of several tables side by side, [last - first, sum of their widths]."""
    return np.concatenate([rows(group, key, first, last, dims=2) for key in keys], -1)
