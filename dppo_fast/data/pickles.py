"""Pickles of NumPy arrays and builtin containers, read without running anything that they name.

A pickle is a program, which imports functions and calls them. Here it gets to see a handful of names, and what stands
behind them only takes notes: no NumPy code sees the pickle's bytes before they are known to be numbers.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dppo_fast.types import UserError

_BUILTINS = {kind.__name__: kind for kind in (complex, frozenset, set)}


def read_pickle(path: Path) -> Any:
    """Dicts, lists, tuples, sets, strings, numbers and arrays of numbers; an array of objects becomes a list.

    The whole file is read into memory. Raises UserError where it is missing or damaged, or names anything else.
    """
    try:
        with path.open("rb") as file:
            _require_modest(file)
            file.seek(0)
            return _plain(_Reader(file).load(), {})
    except FileNotFoundError as error:
        raise UserError("no such file") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may do any of its operations to any of its values
        raise UserError(f"not a readable pickle ({error or type(error).__name__})") from error


def _require_modest(file: BinaryIO) -> None:
    """Values are numbered as they are put aside; a number above their count would reserve memory up to it."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise UserError(f"not a readable pickle (value number {argument} among {count})")


class _Reader(pickle.Unpickler):
    """Knows names that stand for data. They are bound methods, of which a pickle cannot set the code."""

    def find_class(self, module: str, name: str) -> Any:
        match f"{module.replace('numpy._core', 'numpy.core')}.{name}":
            case "numpy.ndarray" | "numpy.core.multiarray._reconstruct":
                return self._array
            case "numpy.core.numeric._frombuffer":
                return self._from_buffer
            case "numpy.core.multiarray.scalar":
                return self._scalar
            case "numpy.dtype":
                return self._dtype
            case "_codecs.encode":
                return self._encode
            case "builtins.bytes" | "__builtin__.bytes":
                return self._empty_bytes
            case "collections.OrderedDict":
                return dict
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return _BUILTINS[name]
        raise UserError(f"it holds an object of {module}.{name}; only arrays and builtin containers are read")

    def _array(self, *_: Any) -> _Array:
        return _Array()

    def _from_buffer(
        self, data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
    ) -> _Array:
        array = _Array(axes)
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array

    def _scalar(self, dtype: _Dtype, data: Any) -> _Array:
        return self._from_buffer(data, dtype, (), "C")

    def _dtype(self, name: str, *_: Any) -> _Dtype:
        return _Dtype(name)

    def _empty_bytes(self) -> bytes:
        return b""

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise UserError(f"it encodes text as {encoding}, which NumPy does not")
        return text.encode("latin1")


class _Dtype:
    """What a pickle says of a dtype."""

    def __init__(self, name: str) -> None:
        self._name, self._order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    @property
    def of_objects(self) -> bool:
        return self._name == "O8"

    def plain(self) -> np.dtype[Any]:
        if not re.fullmatch(r"[biufc]\d{1,2}", self._name) or self._order not in tuple("<>|="):
            raise UserError(f"it holds an array of dtype {self._name!r}; only numbers are read")
        return np.dtype(self._order + self._name)


class _Array:
    """What a pickle says of an array, whose ``axes`` may lie in memory in another order."""

    def __init__(self, axes: tuple[int, ...] | None = None) -> None:
        self._axes = axes
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def plain(self, known: dict[int, Any]) -> list[Any] | NDArray[Any]:
        _, shape, dtype, fortran_order, data = self._state
        if dtype.of_objects:
            return [_plain(value, known) for value in data]
        array: NDArray[Any] = np.ndarray(shape, dtype.plain(), data, order="F" if fortran_order else "C")
        return array if self._axes is None else array.transpose(self._axes)


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """``value`` with arrays for the notes on them; ``known`` are the values that were done, by identity."""
    if id(value) not in known:
        if isinstance(value, _Array):
            done: Any = value.plain(known)
        elif isinstance(value, dict):
            done = {_plain(key, known): _plain(item, known) for key, item in value.items()}
        elif isinstance(value, list | tuple | set | frozenset):
            done = type(value)(_plain(item, known) for item in value)
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
            done = value
        else:
            raise UserError(f"it holds a {type(value).__name__}, which is no data")
        known[id(value)] = done
    return known[id(value)]
