"""The clipped PPO objective and the clipped value loss (Schulman et al. 2017, eq. 7 and 9).

    r        = exp(lp - lp_old)
    loss_pg  = -mean(min(r A, clip(r, 1 - c, 1 + c) A))
    kl       = mean(r - 1 - log r)                              Schulman 2020, "k3"
    loss_v   = 0.5 mean(max((V - R)^2, (V_old + clip(V - V_old, -cv, cv) - R)^2))

lp [B] log-probs, A [B] advantages, c [B] or scalar clip range, V [B] values, R [B] returns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """0-d tensors; only ``loss`` carries a gradient."""

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio: Tensor


def exp_minus_one_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series near 0, where the difference cancels in float32 (relative error 1e-6 there)."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    return torch.where(x.abs() < 0.05, series, torch.expm1(x) - x)


def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: Tensor) -> PolicyLoss:
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    with torch.no_grad():
        return PolicyLoss(
            loss,
            approx_kl=exp_minus_one_minus(log_ratio).mean(),
            clip_fraction=((ratio - 1).abs() > clip).float().mean(),
            ratio=ratio.mean(),
        )


def value_loss(value: Tensor, returns: Tensor, old_value: Tensor, clip: float | None = None) -> Tensor:
    error = (value - returns).square()
    if clip is not None:
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * error.mean()
