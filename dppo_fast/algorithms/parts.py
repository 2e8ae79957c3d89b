"""What an algorithm is put together from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dppo_fast.data.trajectories import Trajectories
from dppo_fast.policies.base import Policy
from dppo_fast.runtime.precision import RECIPES, Recipe


@dataclass(frozen=True)
class Parts:
    """Everything that the configuration gives an algorithm besides its own options.

    Each iteration collects ``n_steps`` decisions of ``num_envs`` environments, which execute the first ``act_steps`` of
    a chunk and see ``cond_steps`` observations. ``value`` and ``action_value`` make the critics V(obs) -> [B] and
    Q(obs, action) -> [Q, B] that the configuration describes, on ``device`` and with other weights at every call; their
    arguments go before the configuration's. ``trajectories`` reads the demonstrations and raises UserError where the
    configuration names none. ``generator`` is the source of all randomness. ``reference`` asks for the reference's
    behaviour where it differs. ``pretrained`` tells whether the policy starts from a checkpoint.
    """

    policy: Policy
    value: Callable[..., nn.Module]
    action_value: Callable[..., nn.Module]
    trajectories: Callable[[], Trajectories]
    num_envs: int
    n_steps: int
    act_steps: int
    cond_steps: int
    device: torch.device
    generator: torch.Generator
    graphs: bool = False
    recipe: Recipe = RECIPES["fp32"]
    reference: bool = False
    pretrained: bool = True
