"""Transitions to learn from again and again: of past rollouts, and of demonstrations.

A transition is one decision: its action chunk, the reward summed over the chunk, and where that led.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.types import Obs, Record


class Transitions(NamedTuple):
    """B decisions. ``next_obs`` is what the episode saw next, also where it ended there; only ``terminated`` [B], 1
    or 0, forbids to bootstrap from it. ``record`` holds whatever else was kept of a decision.
    """

    obs: Obs
    action: Tensor  # [B, Th, Da]
    reward: Tensor  # [B]
    next_obs: Obs
    terminated: Tensor  # [B]
    record: Record

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor and its path: ``obs/state``, ``action``, ..."""
        for field, value in self._asdict().items():
            if isinstance(value, Tensor):
                yield field, value
            else:
                yield from ((f"{field}/{name}", tensor) for name, tensor in value.items())

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> Transitions:
        """What ``items`` was taken of."""
        fields: dict[str, Any] = {"obs": {}, "next_obs": {}, "record": {}}
        for path, tensor in tensors:
            field, _, name = path.partition("/")
            if name:
                fields[field][name] = tensor
            else:
                fields[field] = tensor
        return cls(**fields)

    def map(self, function: Callable[[Tensor], Tensor]) -> Transitions:
        """The same of every tensor's ``function``."""
        return self.of((path, function(value)) for path, value in self.items())

    @classmethod
    def collected(cls, rollout: RolloutBuffer) -> Transitions:
        """A rollout's T decisions of N envs, every tensor [T, N, ...], with nothing in ``record``."""
        next_obs = {name: torch.cat((value[1:], rollout.last_obs[name][None])) for name, value in rollout.obs.items()}
        for t, final in rollout.final:  # in rows where no episode ended it repeats the next observation
            for name, value in final.items():
                next_obs[name][t] = value
        return cls(rollout.obs, rollout.record["action"], rollout.reward, next_obs, rollout.terminated.float(), {})

    @classmethod
    def join(cls, parts: Sequence[Transitions]) -> Transitions:
        """One batch of several; what not all of them recorded is left out."""
        if len(parts) == 1:
            return parts[0]
        first, *others = (dict(part.items()) for part in parts)
        shared = [path for path in first if all(path in other for other in others)]
        return cls.of((path, torch.cat([first[path], *(other[path] for other in others)])) for path in shared)


class ReplayBuffer:
    """The last ``capacity`` transitions, as device tensors [capacity, ...] that are allocated once and stay in place.

    ``keep`` names the entries of an actor's record that are stored besides its ``action``. Rows ``[0, size)`` hold
    transitions; the next one goes to row ``head``.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu", keep: Sequence[str] = ()) -> None:
        self.capacity = capacity
        self.device = torch.device(device)
        self.keep = tuple(keep)
        self.data: dict[str, Tensor] = {}
        self.size = self.head = 0
        self._changed = torch.zeros(capacity, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return self.size

    def extend(self, rollout: RolloutBuffer) -> None:
        """Store what was collected: the actions in its record, and no row that must not be learned from."""
        collected = Transitions.collected(rollout)
        record = {name: rollout.record[name] for name in self.keep}
        flat = collected._replace(record=record).map(lambda value: value.flatten(0, 1))
        self.add(flat.map(lambda value: value[rollout.valid.flatten()]) if rollout.invalid else flat)

    def add(self, transitions: Transitions) -> None:
        """Store ``transitions``, the newest last, over the oldest where there is no room."""
        n = len(transitions.reward)
        stored = min(n, self.capacity)
        rows = (self.head + torch.arange(n - stored, n, device=self.device)) % self.capacity
        for path, value in transitions.items():
            self._slot(path, value)[rows] = value[n - stored :].to(self.device)
        self._changed.index_fill_(0, rows, True)
        self.head = (self.head + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def draw(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        """Rows [B], uniform and with replacement."""
        return torch.randint(self.size, (batch_size,), generator=generator, device=self.device)

    def gather(self, rows: Tensor) -> Transitions:
        """The transitions in ``rows`` [B]."""
        return Transitions.of((path, value[rows]) for path, value in self.data.items())

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Transitions:
        """B transitions, uniform and with replacement."""
        return self.gather(self.draw(batch_size, generator))

    def rewrite(self, path: str, rows: Tensor, values: Tensor) -> None:
        """From now on the transitions in ``rows`` [B] have ``values`` [B, ...] as ``path``, named as in `items`."""
        self.data[path][rows] = values
        self._changed.index_fill_(0, rows, True)

    def amend(self, path: str, value: Tensor) -> None:
        """Let the transitions that are stored have ``value`` [size, ...] under ``path`` (see `Transitions.items`)."""
        stored = self.data[path][: self.size]
        self._changed[: self.size] |= (stored != value).view(self.size, -1).any(-1)
        stored.copy_(value)

    def changes(self, everything: bool = False) -> dict[str, Any]:
        """What was stored or rewritten since the last call, or ``everything``: what `apply` takes."""
        rows = torch.arange(self.size, device=self.device) if everything else self._changed.nonzero().squeeze(-1)
        self._changed.zero_()
        data = {path: value[rows] for path, value in self.data.items()}
        return {"rows": rows, "data": data, "size": self.size, "head": self.head, "capacity": self.capacity}

    def apply(self, changes: dict[str, Any]) -> None:
        """Repeat the ``changes`` of another buffer of this capacity; all of them, in order, make an equal one."""
        rows = changes["rows"].to(self.device)
        for path, value in changes["data"].items():
            self._slot(path, value)[rows] = value.to(self.device)
        self._changed.index_fill_(0, rows, False)
        self.size, self.head = int(changes["size"]), int(changes["head"])

    def _slot(self, path: str, value: Tensor) -> Tensor:
        if path not in self.data:
            self.data[path] = torch.empty((self.capacity, *value.shape[1:]), dtype=value.dtype, device=self.device)
        return self.data[path]
