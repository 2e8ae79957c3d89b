"""What the trainer asks of an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from torch import nn

from dppo_fast.algorithms.parts import Parts
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.policies.base import Policy
from dppo_fast.replay import ReplayBuffer
from dppo_fast.types import Actor, Metrics, ObsShapes


class Algorithm(ABC):
    """How to learn. ``actor`` decides, ``buffer`` receives what the trainer collects, ``update`` learns from it.

    ``deployed`` names the one of ``modules()`` whose weights evaluation and fine-tuning start from, ``judges`` those
    which choose among its proposals where it acts. ``replay`` is what a checkpoint holds beside ``state_dict``, as
    changes since the one before.
    """

    actor: Actor
    buffer: RolloutBuffer | None = None
    replay: ReplayBuffer | None = None
    deployed: str = "policy"
    judges: tuple[str, ...] = ()

    @abstractmethod
    def steps_to_collect(self, iteration: int) -> int:
        """Decisions per env to collect before this iteration's update; 0 learns offline."""

    @abstractmethod
    def update(self, iteration: int) -> Metrics:
        """Learn for one iteration."""

    @abstractmethod
    def step_schedules(self, iteration: int) -> None:
        """Advance the learning rates by one iteration; called once per iteration, also after one without an update."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules whose weights a checkpoint holds, by name."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything beside the modules' weights that an exact continuation needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OnlineAlgorithm(Algorithm):
    """An algorithm that learns from what its actor collects; ``trains`` is the kind of policy that it can train."""

    trains: ClassVar[type] = Policy

    @classmethod
    @abstractmethod
    def build(cls, options: Any, parts: Parts) -> Self:
        """Put together for a run; ``options`` is the algorithm's config. Raises UserError where the two do not fit."""

    @abstractmethod
    def memory(self, obs_shapes: ObsShapes) -> dict[str, int]:
        """The bytes that it needs, by what for."""
