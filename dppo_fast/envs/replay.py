"""How to bring simulators that cannot set their state back to a moment: reset as often, then repeat the actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dppo_fast.envs.simulator import Array, Ids, Simulator


class EpisodeLog:
    """Of N envs, how often each was reset, and the raw action chunks [Ta, Da] that its running episode has executed."""

    def __init__(self, num_envs: int) -> None:
        self.resets: Ids = np.zeros(num_envs, np.int64)
        self._chunks: list[list[NDArray[np.float64]]] = [[] for _ in range(num_envs)]

    @property
    def lengths(self) -> Ids:
        """Chunks executed in the running episodes [N]."""
        return np.array([len(chunks) for chunks in self._chunks])

    def append(self, actions: NDArray[np.float64], ids: Ids) -> None:
        """Record a chunk of each env in ``ids``: ``actions`` [n, Ta, Da], not to be written to afterwards."""
        for i, chunk in zip(ids, actions, strict=True):
            self._chunks[i].append(chunk)

    def begin(self, ids: Ids) -> None:
        """Record that the envs ``ids`` were reset."""
        self.resets[ids] += 1
        for i in ids:
            self._chunks[i].clear()

    def replay(self, simulator: Simulator, seed: int) -> dict[str, Array]:
        """Bring a simulator to this moment and give its observations there, one of each env."""
        ids = np.arange(len(self._chunks))
        simulator.seed(seed, self.resets - 1)
        last = {name: value.copy() for name, value in simulator.reset(ids).items()}
        lengths = self.lengths
        for position in range(lengths.max()):
            ids = np.flatnonzero(lengths > position)
            for actions in np.stack([self._chunks[i][position] for i in ids], 1):  # [n, Da]
                obs, *_ = simulator.step(actions, ids)
                for name, value in obs.items():
                    last[name][ids] = value
        return last

    def state_dict(self) -> dict[str, Any]:
        chunks = [chunk for chunks in self._chunks for chunk in chunks]
        return {
            "resets": torch.tensor(self.resets),
            "lengths": torch.tensor(self.lengths),
            "chunks": torch.tensor(np.array(chunks, np.float64)),  # [sum of lengths, Ta, Da]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resets = state["resets"].cpu().numpy().copy()
        ends = np.cumsum(state["lengths"].cpu().numpy())
        self._chunks = [list(chunks) for chunks in np.split(state["chunks"].cpu().numpy().copy(), ends[:-1])]
