"""Losses and log-densities that score given actions or chains with a denoising network."""

from __future__ import annotations

from torch import Tensor

from dppo_fast.diffusion.sampler import Clips, DenoisingNetwork
from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.denoise_step import gaussian_log_density, posterior_mean
from dppo_fast.types import Obs


def denoising_loss(
    network: DenoisingNetwork,
    schedule: NoiseSchedule,
    obs: Obs,
    action: Tensor,
    t: Tensor,
    noise: Tensor,
    predict_epsilon: bool = True,
) -> Tensor:
    """Mean squared error of the predicted noise (or clean action) at timesteps ``t`` [B] (Ho et al. 2020, eq. 14).

    The time part is computed for all K timesteps and gathered: K rows instead of B.
    """
    all_times = network.time_table(schedule.sqrt_alphas_cumprod.new_ones(schedule.denoising_steps).cumsum(0) - 1)
    prediction = network.denoise(schedule.add_noise(action, t, noise), all_times[t], network.encode_obs(obs))
    return (prediction - (noise if predict_epsilon else action)).square().mean()


def transition_log_density(
    network: DenoisingNetwork,
    schedule: NoiseSchedule,
    obs: Obs,
    x: Tensor,
    x_next: Tensor,
    k: Tensor,
    first: int,
    min_std: float | Tensor,
    clips: Clips,
    eta: Tensor | None = None,
) -> Tensor:
    """Elementwise log-density [B, Th, Da] of the transitions x -> x_next at steps ``first + k``, always stochastic.

    ``k`` [B] counts the network's own steps, which start at ``first`` in the order of sampling.
    """
    times = network.time_table(schedule.timesteps[first:])
    eps = network.denoise(x, times[k], network.encode_obs(obs))
    row = schedule.coefficients(first + k, eta=eta)
    mean = posterior_mean(eps, x, row, clips.x0, clips.eps)
    return gaussian_log_density(x_next, mean, row.std.clamp(min=min_std))
