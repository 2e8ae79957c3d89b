"""D3IL: one pickle per demonstration (Jia et al. 2024, arXiv 2402.14606)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dppo_fast.config import naming
from dppo_fast.data.convert.stream import Block, Conversion, Stream
from dppo_fast.data.pickles import read_pickle
from dppo_fast.types import UserError


@dataclass
class D3IL(Conversion):
    usage: ClassVar[str] = """A folder of D3IL's state files, <name>.pkl, of which nothing is unpickled.

The state is low_dim_keys side by side, <group>/<key>:<first columns>; an action is the change of action_key from one
row to the next. The defaults are those of its avoiding task: desired and actual position of the tip in the plane."""

    low_dim_keys: list[str] = field(default_factory=lambda: ["robot/des_c_pos:2", "robot/c_pos:2"])
    action_key: str = "robot/des_c_pos:2"

    @contextmanager
    def open(self) -> Iterator[Stream]:
        source = Path(self.source)
        files = sorted(source.glob("*.pkl")) if source.is_dir() else [source]
        if not files:
            raise UserError("the folder holds no .pkl files")
        steps = sum(len(block.states) for block in self._blocks(files))
        yield Stream(steps, self._blocks(files))

    def _blocks(self, files: Sequence[Path]) -> Iterator[Block]:
        for file in files:
            with naming(file.name):
                content = read_pickle(file)
                states = [_columns(content, key) for key in self.low_dim_keys]
                desired = _columns(content, self.action_key)
                if len(lengths := {len(table) for table in [*states, desired]}) > 1 or len(desired) < 2:
                    raise UserError(f"its tables have {sorted(lengths)} rows; one number of at least 2 is needed")
            yield Block(np.concatenate(states, -1)[:-1], np.diff(desired, axis=0))


def _columns(content: Any, key: str) -> NDArray[Any]:
    """The table ``group/key:n``, its first n columns."""
    path, _, count = key.partition(":")
    for part in path.split("/"):
        if not isinstance(content, dict) or part not in content:
            found = ", ".join(map(str, content)) if isinstance(content, dict) else "no dict"
            raise UserError(f"has no {path!r}: there is {found}")
        content = content[part]
    if not isinstance(content, np.ndarray) or content.ndim != 2 or (count and not count.isdecimal()):
        raise UserError(f"{key!r} is no table of numbers, or not of the form group/key:columns")
    if count and content.shape[1] < int(count):
        raise UserError(f"{path!r} has {content.shape[1]} columns, not {count}")
    return content[:, : int(count)] if count else content
