"""Simulators whose every number is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dppo_fast.envs import ChunkEnv, Identity, Normalization
from dppo_fast.envs.simulator import Array, Ids


class ToySimulator:
    """State (episode, t, acc) with acc = 0.5 acc + a0 - 2 a1 and reward a0 + a1 + 0.1 t, as the golden file has.

    ``done_at`` and ``limit_at`` map an episode's index to the steps that terminate or truncate it. ``log`` holds what
    was executed: (env, episode, t). ``corrupt`` may change observations and rewards before they are returned.
    """

    def __init__(
        self,
        num_envs: int = 1,
        done_at: Mapping[int, Sequence[int]] | None = None,
        limit_at: Mapping[int, Sequence[int]] | None = None,
        corrupt: Callable[[Ids, Array, Array], None] | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.obs_shapes = {"state": (3,)}
        self.action_low, self.action_high = -np.ones(2), np.ones(2)
        self.state = np.zeros((num_envs, 3))
        self.log: list[tuple[int, int, int]] = []
        self._done_at, self._limit_at, self._corrupt = done_at or {}, limit_at or {}, corrupt

    def seed(self, seed: int, resets: Ids) -> None:
        self.state[:, 0] = resets - 1

    def reset(self, ids: Ids) -> dict[str, Array]:
        self.state[ids, 0] += 1
        self.state[ids, 1:] = 0
        return {"state": self._corrupted(ids, np.zeros(len(ids)))[0]}

    def step(self, actions: Array, ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        a0, a1 = actions.T
        self.state[ids, 1] += 1
        self.state[ids, 2] = 0.5 * self.state[ids, 2] + a0 - 2 * a1
        episode, t = self.state[ids, :2].astype(int).T
        self.log += zip(ids.tolist(), episode.tolist(), t.tolist(), strict=True)
        terminated, truncated = (
            np.array([step in table.get(e, ()) for e, step in zip(episode, t, strict=True)])
            for table in (self._done_at, self._limit_at)
        )
        state, reward = self._corrupted(ids, a0 + a1 + 0.1 * t)
        return {"state": state}, reward, terminated, truncated

    def close(self) -> None: ...

    def _corrupted(self, ids: Ids, reward: Array) -> tuple[Array, Array]:
        state = self.state[ids]
        if self._corrupt:
            self._corrupt(ids, state, reward)
        return state, reward


def chunk_env(simulator: Any, normalization: Normalization | None = None, **options: Any) -> ChunkEnv:
    defaults: dict[str, Any] = {"act_steps": 4, "obs_steps": 2, "max_episode_steps": 1000, "device": "cpu", "seed": 0}
    identity = Identity(simulator.action_low, simulator.action_high)
    return ChunkEnv(simulator, normalization or identity, **(defaults | options))


def random_actions(env: ChunkEnv, chunks: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (chunks, env.num_envs, env.act_steps, env.action_dim)
    return torch.rand(shape, generator=generator) * 2 - 1
