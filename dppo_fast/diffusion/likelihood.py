"""What a denoising network predicts for given actions or chains."""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_fast.diffusion.sampler import DenoisingNetwork
from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.types import Obs


def denoising_errors(
    network: DenoisingNetwork,
    schedule: NoiseSchedule,
    obs: Obs,
    action: Tensor,
    t: Tensor,
    noise: Tensor,
    predict_epsilon: bool = True,
) -> Tensor:
    """Each sample's mean squared error [B] of the predicted noise (or clean action) at timesteps ``t`` [B] (Ho et al.
    2020, eq. 14); ``action`` and ``noise`` are [B, Th, Da].

    The time part is computed for all K timesteps and gathered: K rows instead of B.
    """
    all_times = network.time_table(torch.arange(schedule.denoising_steps, dtype=noise.dtype, device=noise.device))
    prediction = network.denoise(schedule.add_noise(action, t, noise), all_times[t], network.encode_obs(obs))
    return (prediction - (noise if predict_epsilon else action)).square().mean((1, 2))


def predict(
    network: DenoisingNetwork, schedule: NoiseSchedule, obs: Obs, x: Tensor, k: Tensor, first: int = 0
) -> Tensor:
    """The network's output [B, Th, Da] at ``x`` and steps ``first + k``.

    ``k`` [B] counts the network's own steps, which start at ``first`` in the order of sampling.
    """
    times = network.time_table(schedule.timesteps[first:])
    return network.denoise(x, times[k], network.encode_obs(obs))
