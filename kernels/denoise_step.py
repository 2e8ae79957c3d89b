"""One denoising step of a DDPM or DDIM chain, and its Gaussian log-density.

    x0   = clip(cx x + ce eps)                                  predicted clean action
    mean = m0 x0 + mx x                                         posterior mean
         = (m0 + mx sa) x0 + mx s clip((x - sa x0) / s)         the same, where eps is recomputed and clipped as well
    x'   = mean + std z
    lp   = mean over the first reward_horizon steps and all action dims of
           clip(-(x' - mean)^2 / (2 L^2) - log L - log(2 pi) / 2, -5, 2)

x [B, Th, Da] noisy action chunk, eps the network's output, z standard normal, L the log-prob's std; the other letters
are one row of a noise schedule (`Coefficients`). Ho et al. 2020 (eq. 7, 11), Song et al. 2021 (eq. 12), Ren et al.
2024.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_PROB_RANGE = (-5.0, 2.0)
"""Per-element log-densities are clamped to this range before they are averaged."""


class Coefficients(NamedTuple):
    """One denoising step, broadcastable against [B, Th, Da]: scalars, [B, 1, 1] or (std, m0, mx with learned eta) [B,
    1, Da].
    """

    cx: Tensor
    ce: Tensor
    m0: Tensor
    mx: Tensor
    std: Tensor
    sa: Tensor
    s: Tensor


def posterior_mean(
    eps: Tensor, x: Tensor, c: Coefficients, x0_clip: float | None = None, eps_clip: float | None = None
) -> Tensor:
    """The mean of x' given x and the network's output: [B, Th, Da]."""
    x0 = c.cx * x + c.ce * eps
    if x0_clip is not None:
        x0 = x0.clamp(-x0_clip, x0_clip)
    if eps_clip is None:
        return c.m0 * x0 + c.mx * x
    eps = ((x - c.sa * x0) / c.s).clamp(-eps_clip, eps_clip)
    return (c.m0 + c.mx * c.sa) * x0 + c.mx * c.s * eps


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log N(x; mean, std^2)."""
    return -0.5 * ((x - mean) / std).square() - torch.log(std) - 0.5 * math.log(2 * math.pi)


def chunk_log_prob(log_density: Tensor, reward_horizon: int) -> Tensor:
    """Elementwise log-densities [B, Th, Da] -> [B]: clamped, cut to the first ``reward_horizon`` steps, averaged."""
    return log_density[:, :reward_horizon].clamp(*LOG_PROB_RANGE).mean(dim=(-2, -1))


def denoise_step(
    eps: Tensor,
    x: Tensor,
    noise: Tensor,
    c: Coefficients,
    std: Tensor,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
    out_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: (x', mean), both [B, Th, Da].

    ``std`` is the sampling std (c.std with its floor, or 0), ``noise`` the draw z, already clamped; ``out_clip``
    bounds x'.
    """
    mean = posterior_mean(eps, x, c, x0_clip, eps_clip)
    x_next = mean + std * noise
    return (x_next if out_clip is None else x_next.clamp(-out_clip, out_clip)), mean
