"""Sampling a denoising chain in two segments: the frozen base network first, the fine-tuned one for the last F
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.denoise_step import chunk_log_prob, denoise_step, gaussian_log_density
from dppo_fast.types import Obs


class DenoisingNetwork(Protocol):
    """A network whose observation and time parts can be computed ahead of the chain."""

    def encode_obs(self, obs: Obs) -> Tensor: ...

    def time_table(self, t: Tensor) -> Tensor: ...

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Segment:
    """A stretch of the chain, ``steps`` in the order of sampling, that one network denoises."""

    network: DenoisingNetwork
    steps: range


@dataclass(frozen=True)
class Clips:
    """Symmetric bounds; None does not bound. ``x0``, ``eps``: the step's predictions. ``randn``: the draws of the
    steps, not the initial x. ``action``: the chain's last x, as it is stored.
    """

    x0: float | None = 1.0
    eps: float | None = None
    randn: float | None = 10.0
    action: float | None = None


@dataclass(frozen=True)
class Scoring:
    """Where and how the sampler records the chain: from step ``first`` on, with the log-prob's std floor and
    horizon.
    """

    first: int
    min_std: float | Tensor
    reward_horizon: int


@dataclass(frozen=True)
class Chain:
    """``action`` [B, Th, Da]; with scoring also the points before and after each scored step [B, F+1, Th, Da] and their
    behaviour log-probs [B, F]."""

    action: Tensor
    points: Tensor | None = None
    log_prob: Tensor | None = None


def sample_chain(
    segments: Sequence[Segment],
    schedule: NoiseSchedule,
    obs: Obs,
    noise: Tensor,
    std: Tensor,
    clips: Clips,
    deterministic: bool = False,
    eta: Tensor | None = None,
    scoring: Scoring | None = None,
) -> Chain:
    """Denoise ``noise[0]``, using draw ``noise[k + 1]`` at step k.

    Args:
        segments: together they cover range(S); each network is evaluated on its own steps only.
        noise: [S + 1, B, Th, Da], standard normal.
        std: [S] sampling std, or [S, B, 1, 1 or Da] where eta depends on the observation.
        eta: [B, 1 or Da], replaces the schedule's.
        scoring: record the chain and its log-probs. Needs a stochastic chain, whose means are those that are scored.
    """
    assert scoring is None or not deterministic
    x = noise[0]
    draws = noise[1:] if clips.randn is None else noise[1:].clamp(-clips.randn, clips.randn)
    points, log_probs = [], []
    if scoring is not None and scoring.first == 0:
        points.append(x)
    for segment in segments:
        if not segment.steps:
            continue
        network = segment.network
        encoded = network.encode_obs(obs)
        times = network.time_table(schedule.timesteps[segment.steps.start : segment.steps.stop])
        for k, time in zip(segment.steps, times, strict=True):
            row = schedule.coefficients(k, deterministic, eta)
            out_clip = clips.action if k == schedule.steps - 1 else None
            eps = network.denoise(x, time, encoded)
            x, mean = denoise_step(eps, x, draws[k], row, std[k], clips.x0, clips.eps, out_clip)
            if scoring is None:
                continue
            if k >= scoring.first - 1:
                points.append(x)
            if k >= scoring.first:
                density = gaussian_log_density(x, mean, row.std.clamp(min=scoring.min_std))
                log_probs.append(chunk_log_prob(density, scoring.reward_horizon))
    if scoring is None:
        return Chain(x)
    return Chain(x, torch.stack(points, 1), torch.stack(log_probs, 1))
