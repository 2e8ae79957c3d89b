"""Sampling a denoising chain in two segments: the frozen base network first, the fine-tuned one for the last F
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.denoise_step import Bounds, Score, sampling_step, sampling_step_reference
from dppo_fast.kernels.mlp_chain import ChainOptions, MLPSegment, MLPStep, mlp_chain
from dppo_fast.runtime.precision import MatMul, matmul_precision
from dppo_fast.types import Obs


class DenoisingNetwork(Protocol):
    """A network whose observation and time parts can be computed ahead of the chain."""

    def encode_obs(self, obs: Obs) -> Tensor: ...

    def time_table(self, t: Tensor) -> Tensor: ...

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor: ...

    def step(self, t: Tensor) -> tuple[MLPStep, Tensor] | None:
        """``denoise`` as data and ``time_table(t)``, if the op `mlp_chain` can run them."""
        ...


@dataclass(frozen=True)
class Segment:
    """A stretch of the chain, ``steps`` in the order of sampling, that one network denoises."""

    network: DenoisingNetwork
    steps: range
    precision: MatMul = "fp32"


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
    min_std: float
    reward_horizon: int


@dataclass(frozen=True)
class Chain:
    """``action`` [B, Th, Da]; with scoring also the points before and after each scored step [B, F+1, Th, Da] and their
    behaviour log-probs [B, F]."""

    action: Tensor
    points: Tensor | None = None
    log_prob: Tensor | None = None


@torch.no_grad()
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
    """Denoise ``noise[0]``, using draw ``noise[k + 1]`` at step k, without gradients.

    Args:
        segments: together they cover range(S); each network is evaluated on its own steps only.
        noise: [S + 1, B, Th, Da], standard normal.
        std: [S] sampling std, or [S, B, 1, 1 or Da] where eta depends on the observation.
        eta: [B, 1 or Da], replaces the schedule's.
        scoring: record the chain and its log-probs, which mean something for a stochastic chain only.
    """
    segments = [segment for segment in segments if segment.steps]
    steps = [segment.network.step(_timesteps(segment, schedule)) for segment in segments]
    if eta is None and None not in steps:
        table = schedule.deterministic_table if deterministic else schedule.table
        parts = [
            MLPSegment(*step, segment.network.encode_obs(obs), segment.precision)
            for segment, step in zip(segments, steps, strict=True)
            if step is not None
        ]
        return _mlp_chain(parts, table, noise, std, clips, scoring)
    return _step_by_step(sampling_step, segments, schedule, obs, noise, std, clips, deterministic, eta, scoring)


def differentiable_chain(
    segments: Sequence[Segment],
    schedule: NoiseSchedule,
    obs: Obs,
    noise: Tensor,
    std: Tensor,
    clips: Clips,
    eta: Tensor | None = None,
) -> Tensor:
    """The action [B, Th, Da] of the stochastic `sample_chain`, in plain PyTorch and differentiable."""
    return _step_by_step(sampling_step_reference, segments, schedule, obs, noise, std, clips, eta=eta).action


def _step_by_step(
    step: Callable[..., tuple[Tensor, Tensor | None]],
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
    x, draws = noise[0], noise[1:]
    S, (B, Th, Da) = schedule.steps, x.shape
    first, score, points, log_prob = S + 1, None, None, None
    if scoring is not None:
        first, score = scoring.first, Score(scoring.min_std, scoring.reward_horizon)
        points, log_prob = x.new_empty(B, S - first + 1, Th, Da), x.new_empty(B, S - first)
        if first == 0:
            points[:, 0] = x
    for segment in segments:
        network = segment.network
        encoded, times = network.encode_obs(obs), network.time_table(_timesteps(segment, schedule))
        with matmul_precision(segment.precision):
            for k, time in zip(segment.steps, times, strict=True):
                scored = k >= first
                x, _ = step(
                    network.denoise(x, time, encoded),
                    x,
                    draws[k],
                    schedule.coefficients(k, deterministic, eta),
                    std[k],
                    Bounds(clips.x0, clips.eps, clips.randn, clips.action if k == S - 1 else None),
                    score if scored else None,
                    out=points[:, k + 1 - first] if points is not None and k + 1 >= first else None,
                    log_prob_out=log_prob[:, k - first] if log_prob is not None and scored else None,
                )
    return Chain(x, points, log_prob)


def _timesteps(segment: Segment, schedule: NoiseSchedule) -> Tensor:
    return schedule.timesteps[segment.steps.start : segment.steps.stop]


def _mlp_chain(
    segments: Sequence[MLPSegment], table: Tensor, noise: Tensor, std: Tensor, clips: Clips, scoring: Scoring | None
) -> Chain:
    """The whole chain by one op, which knows an action chunk as one row."""
    Th, Da = noise.shape[2:]
    score: tuple[int, int, float] | tuple[()] = ()
    if scoring is not None:
        score = (scoring.first, min(scoring.reward_horizon, Th) * Da, scoring.min_std)
    options = ChainOptions(clips.x0, clips.eps, clips.randn, clips.action, *score)
    x, points, log_prob = mlp_chain(segments, noise.flatten(2), table, std, options)
    return Chain(x.view(-1, Th, Da), None if points is None else points.view(*points.shape[:2], Th, Da), log_prob)
