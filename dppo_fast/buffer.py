"""Preallocated storage for what the collector gathers."""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_fast.types import Obs, Record, Step


class RolloutBuffer:
    """T decisions of N envs, as device tensors [T, N, ...], overwritten by every rollout.

    ``first[t]`` marks the first decision of an episode. ``final`` lists (t, last observation of the episodes that ended
    at t); ``last_obs`` follows the last decision. ``invalid`` counts the rows that must not be learned from, which are
    False in ``valid``.
    """

    def __init__(self, num_steps: int, num_envs: int, device: torch.device | str = "cpu") -> None:
        self.num_steps = num_steps
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.obs: Obs = {}
        self.record: Record = {}
        shape = (num_steps, num_envs)
        self.reward = torch.zeros(shape, device=device)
        self.terminated, self.truncated, self.first, self.valid = (
            torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(4)
        )
        self.final: list[tuple[int, Obs]] = []
        self.last_obs: Obs = {}
        self.t = 0
        self.invalid = False

    def clear(self) -> None:
        self.t = 0
        self.invalid = False
        self.final = []

    def add(self, obs: Obs, record: Record, first: Tensor) -> None:
        """One decision of every env, to be stored before it is executed: the env may then write over ``obs``."""
        for store, values in ((self.obs, obs), (self.record, record)):
            for name, value in values.items():
                self._slot(store, name, value)[self.t] = value
        self.first[self.t] = first

    def complete(self, step: Step) -> None:
        """What came of the decision that was added last."""
        t = self.t
        self.reward[t] = step.reward
        self.terminated[t] = step.terminated
        self.truncated[t] = step.truncated
        self.valid[t] = True if step.valid is None else step.valid
        self.invalid |= step.valid is not None
        if step.final_obs is not None:
            self.final.append((t, {name: value.clone() for name, value in step.final_obs.items()}))
        self.last_obs = step.obs
        self.t += 1

    def _slot(self, store: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
        shape = (self.num_steps, *value.shape)
        if name not in store or store[name].shape != shape:
            store[name] = torch.empty(shape, dtype=value.dtype, device=self.device)
        return store[name]
