"""Behaviour cloning: pre-training a policy on demonstrations, with averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.base import Algorithm
from dppo_fast.data.trajectories import ChunkDataset, epoch_batches
from dppo_fast.networks.vision import RandomShift
from dppo_fast.optim import EMA, LRConfig, Trainable
from dppo_fast.policies.base import Policy
from dppo_fast.runtime.memory import activation_bytes
from dppo_fast.types import Metrics, Obs, require_ranges


@dataclass(frozen=True)
class BCConfig:
    """Hyperparameters; keys as in the reference.

    The average is a copy of the weights before epoch ``epoch_start_ema``, and from then on is updated every
    ``update_ema_freq`` batches, counted over the whole run. ``ent_coef`` rewards a Gaussian's entropy. ``augment``
    shifts the images of every minibatch at random.
    """

    batch_size: int = 128
    learning_rate: float = 1e-3
    lr_scheduler: LRConfig = field(default_factory=lambda: LRConfig(200, 1, 1e-4))
    weight_decay: float = 1e-6
    ema_decay: float = 0.995
    epoch_start_ema: int = 20
    update_ema_freq: int = 10
    ent_coef: float = 0.0
    augment: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "batch_size": "[1, inf)",
            "learning_rate": "(0, inf)",
            "weight_decay": "[0, inf)",
            "ema_decay": "[0, 1]",
            "epoch_start_ema": "[0, inf)",
            "update_ema_freq": "[1, inf)",
            "ent_coef": "(-inf, inf)",
        }
        require_ranges(self, "algorithm", ranges)
        self.lr_scheduler.require_valid("algorithm.lr_scheduler")


class BehaviourCloning(Algorithm):
    """One iteration is one epoch. ``actor``, which evaluation sees, is the policy with averaged weights."""

    deployed = "ema"

    def __init__(self, policy: Policy, config: BCConfig, dataset: ChunkDataset) -> None:
        self.policy = policy
        self.config = config
        self.dataset = dataset
        self.generator = torch.Generator()
        self.augment = RandomShift()
        self.epoch_batches: Callable[[], Iterable[Tensor]] = self._epoch_batches
        self.ema = EMA(policy, config.ema_decay)
        self.actor = self.ema.average
        self.trainable = Trainable(policy.parameters(), config.learning_rate, config.lr_scheduler, config.weight_decay)
        self.batches = 0

    def steps_to_collect(self, iteration: int) -> int:
        return 0

    def update(self, iteration: int) -> Metrics:
        losses = [self.minibatch(*self.dataset.batch(indices), iteration) for indices in self.epoch_batches()]
        return {"loss/bc": torch.stack(losses).mean(), "lr/policy": self.trainable.schedule.lr}

    def minibatch(self, obs: Obs, action: Tensor, iteration: int) -> Tensor:
        """One optimizer step and, where it is due, one of the average; returns the loss."""
        c = self.config
        self.trainable.zero_grad()
        if c.augment:
            obs = self.augment(obs, self.policy.generator)
        loss = self.policy.cloning_loss(obs, action)
        if c.ent_coef:
            loss = loss - c.ent_coef * self.policy.entropy(obs)
        loss.backward()  # type: ignore[no-untyped-call]
        self.trainable.step()
        if self.batches % c.update_ema_freq == 0:
            if iteration + 1 < c.epoch_start_ema:
                self.ema.copy_from(self.policy)
            else:
                self.ema.update(self.policy)
        self.batches += 1
        return loss.detach()

    def step_schedules(self, iteration: int) -> None:
        self.trainable.schedule.step()

    def _epoch_batches(self) -> Iterable[Tensor]:
        return epoch_batches(len(self.dataset), self.config.batch_size, self.generator)

    def memory(self) -> dict[str, int]:
        """Bytes of all weights with their average, gradients and moments, and, estimated from one window, of what the
        backward pass of a minibatch keeps.
        """
        parameters = list(self.policy.parameters())
        obs, action = self.dataset.batch(torch.zeros(1, dtype=torch.int64))
        window = activation_bytes(lambda: self.policy.cloning_loss(obs, action), parameters)
        windows = self.config.batch_size
        return {
            "weights": sum(p.nbytes * (5 if p.requires_grad else 2) for p in parameters),
            f"activations of {windows} windows": windows * window,
        }

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "ema": self.ema.average}

    def state_dict(self) -> dict[str, Any]:
        return {"trainable": self.trainable.state_dict(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainable.load_state_dict(state["trainable"])
        self.batches = int(state["batches"])
