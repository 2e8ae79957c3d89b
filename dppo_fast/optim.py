"""Learning-rate schedules, optimizers that can be stopped on the device, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dppo_fast.types import require_ranges


@dataclass(frozen=True)
class LRConfig:
    """Cosine annealing with linear warm-up and restarts; lengths in scheduler steps (iterations, or epochs)."""

    first_cycle_steps: int = 1000
    warmup_steps: int = 10
    min_lr: float = 1e-4

    def require_valid(self, key: str) -> None:
        """Raise UserError for a value out of range; ``key`` is this schedule's key in the configuration."""
        ranges = {
            "first_cycle_steps": "[1, inf)",
            "warmup_steps": f"[0, {self.first_cycle_steps})",
            "min_lr": "[0, inf)",
        }
        require_ranges(self, key, ranges)


class CosineWarmup:
    """Sets an optimizer's learning rate; each cycle rises from min_lr to max_lr, then falls along a cosine.

    Right after construction the rate is min_lr, also without warm-up, as in the reference.
    """

    def __init__(self, optimizer: Optimizer, max_lr: float, config: LRConfig) -> None:
        self.optimizer = optimizer
        self.max_lr = max_lr
        self.config = config
        self.steps = 0
        self._apply(config.min_lr)

    def step(self) -> None:
        self.steps += 1
        self._apply(self._rate())

    def _rate(self) -> float:
        c = self.config
        s = self.steps % c.first_cycle_steps
        if s < c.warmup_steps:
            share = s / c.warmup_steps
        else:
            share = (1 + math.cos(math.pi * (s - c.warmup_steps) / (c.first_cycle_steps - c.warmup_steps))) / 2
        return c.min_lr + (self.max_lr - c.min_lr) * share

    def state_dict(self) -> dict[str, float]:
        return {"steps": self.steps, "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A rate that is configured anew holds at once."""
        self.steps = int(state["steps"])
        self._apply(self._rate() if self.steps else self.config.min_lr)

    def _apply(self, lr: float) -> None:
        self.lr = lr
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class Trainable:
    """Some parameters with their AdamW, learning-rate schedule and optional gradient clipping.

    ``step(skip)`` leaves parameters and moments untouched where the 0-d float tensor ``skip`` is 1, without the host
    having to know. On CUDA the learning rate is a tensor, so that a step can be captured in a graph.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        schedule: LRConfig,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device
        cuda = device.type == "cuda"
        rate = torch.tensor(lr, device=device) if cuda else lr
        self.optimizer = AdamW(self.parameters, lr=rate, weight_decay=weight_decay, fused=True, capturable=cuda)
        self.schedule = CosineWarmup(self.optimizer, lr, schedule)
        self.max_grad_norm = max_grad_norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, skip: Tensor | None = None) -> None:
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=True)
        if skip is not None:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()["state"], "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        current = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**current, "state": {int(k): v for k, v in state["optimizer"].items()}})
        self.schedule.load_state_dict(state["schedule"])


M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """An exponential moving average of a module's parameters: ``average = decay average + (1 - decay) parameters``."""

    def __init__(self, module: M, decay: float) -> None:
        self.decay = decay
        self.average = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def copy_from(self, module: M) -> None:
        torch._foreach_copy_(list(self.average.parameters()), list(module.parameters()))

    @torch.no_grad()
    def update(self, module: M) -> None:
        torch._foreach_lerp_(list(self.average.parameters()), list(module.parameters()), 1 - self.decay)
