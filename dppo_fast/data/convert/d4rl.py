"""D4RL: one HDF5 file of steps in a row (Fu et al. 2020, arXiv 2004.07219)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dppo_fast.data.convert.hdf5 import length, opened, rows
from dppo_fast.data.convert.stream import Block, Conversion, Stream
from dppo_fast.types import UserError


@dataclass
class D4RL(Conversion):
    usage: ClassVar[str] = """D4RL's hdf5: observations, actions, rewards, terminals, timeouts.

An episode ends where terminals or timeouts say so; where the file has no timeouts, max_episode_steps says after how
many steps."""

    max_episode_steps: int | None = None

    @contextmanager
    def open(self) -> Iterator[Stream]:
        with opened(Path(self.source)) as file:
            steps = length(file, "observations")
            terminals = rows(file, "terminals", 0, steps, dims=1).astype(bool)
            yield Stream(steps, self._blocks(file, terminals), -1, 1)

    def _blocks(self, file: Any, terminals: Any) -> Iterator[Block]:
        first = 0
        for end in self._ends(file, terminals):
            states, actions = (rows(file, key, first, end, dims=2) for key in ("observations", "actions"))
            rewards = rows(file, "rewards", first, end, dims=1)
            yield Block(states, actions, rewards, terminals[first:end])
            first = end

    def _ends(self, file: Any, terminals: Any) -> list[int]:
        """Where episodes end, exclusive."""
        limit = self.max_episode_steps
        if "timeouts" in file:
            if limit is not None:
                raise UserError(f"max_episode_steps={limit}: the file has timeouts of its own; remove it")
            ended = terminals | rows(file, "timeouts", 0, len(terminals), dims=1).astype(bool)
            return sorted({*(np.flatnonzero(ended) + 1).tolist(), len(terminals)})
        if limit is None or limit < 1:
            raise UserError("the file has no timeouts: give the time limit, max_episode_steps=<steps>")
        ends, first = [], 0
        for end in [*(np.flatnonzero(terminals) + 1).tolist(), len(terminals)]:
            ends += [*range(first + limit, end, limit), end]
            first = end
        return sorted(set(ends))
