"""Golden vectors of the reference implementation: numbers that pin its semantics.

`tests/golden/` holds a compact subset; the environment variable DPPO_FAST_GOLDEN names a folder with a full set, made
the same way with any dimensions, seeds and cases. Tests parametrised by `golden_cases` carry the marker `golden` and
run over both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

FOLDERS = [Path(__file__).parent / "golden"]
if "DPPO_FAST_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["DPPO_FAST_GOLDEN"]))


class Case:
    """The arrays below one prefix of one golden file; ``file`` holds the whole file's, its other cases included."""

    def __init__(self, arrays: dict[str, NDArray[Any]], name: str, file: Case | None = None) -> None:
        self._arrays = arrays
        self.name = name
        self.file = self if file is None else file

    def __getitem__(self, key: str) -> NDArray[Any]:
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    @cached_property
    def cfg(self) -> dict[str, Any]:
        """Constructor arguments; empty where the case has none."""
        return json.loads(str(self["cfg"])) if "cfg" in self else {}

    @property
    def cls(self) -> str:
        """The class that ``cfg`` is of, without its module; empty where it names none."""
        return str(self.cfg.get("cls", "")).rpartition(".")[2]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self[key]))

    def sub(self, prefix: str) -> dict[str, NDArray[Any]]:
        return {key[len(prefix) :]: value for key, value in self._arrays.items() if key.startswith(prefix)}

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(np.array(value)) for key, value in self.sub(prefix).items()}

    def case(self, name: str) -> Case:
        return Case(self.sub(name + "/"), name, self.file)


@cache
def golden_file(folder: Path, stem: str) -> Case:
    with np.load(folder / f"{stem}.npz", allow_pickle=False) as arrays:
        return Case({key: arrays[key] for key in arrays.files}, stem)


def golden_cases(stem: str, keep: Callable[[Case], bool] = lambda case: True, array: str | None = None) -> list[Any]:
    """One pytest param per case of the file `stem` in every folder that has it.

    The cases are the file's top-level prefixes, or, of any depth, those below which there is an ``array``.
    """
    params = []
    for folder in FOLDERS:
        if not (folder / f"{stem}.npz").exists():
            continue
        file = golden_file(folder, stem)
        if array is None:
            names = [key.partition("/")[0] for key in file if "/" in key]
        else:
            names = [key.removesuffix("/" + array) for key in file if key.endswith("/" + array)]
        for case in map(file.case, dict.fromkeys(names)):
            if keep(case):
                params.append(pytest.param(case, id=f"{folder.name}-{case.name}", marks=pytest.mark.golden))
    return params
