"""The Gaussian mixture policy over action chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_fast.kernels.denoise_step import gaussian_log_density
from dppo_fast.policies.base import inverse_transform
from dppo_fast.policies.gaussian import DensityPolicy, Draw, gaussian_entropy

Mixture = tuple[Tensor, Tensor, Tensor]
"""Means and stds [B, M, Th * Da], logits [B, M]."""


class GMMPolicy(DensityPolicy):
    """A mixture of M diagonal Gaussians; a decision draws one mode for the whole chunk.

    Unlike the Gaussian's, the log-prob is the joint one, summed over the chunk. The entropy is the modes' mean, a lower
    bound of the mixture's (Huber et al. 2008, theorem 2). Deterministic actions are the mean of the mode drawn.
    """

    def sample(self, density: Mixture, draw: Draw, deterministic: bool = False) -> Tensor:
        mean, std, logits = density
        noise = draw(2).flatten(2)
        mode = inverse_transform(logits.softmax(-1), torch.special.ndtr(noise[0, :, 0]))
        row = torch.arange(len(mode), device=mode.device)
        mean, std = mean[row, mode], std[row, mode]
        return mean if deterministic else mean + std * self._bounded(noise[1])

    def log_density(self, density: Mixture, action: Tensor) -> Tensor:
        mean, std, logits = density
        of_mode = gaussian_log_density(action[:, None], mean, std).sum(-1)
        return torch.logsumexp(logits.log_softmax(-1) + of_mode, -1)

    def mean_entropy(self, density: Mixture) -> Tensor:
        _, std, logits = density
        return (logits.softmax(-1) * gaussian_entropy(std).sum(-1)).sum(-1).mean()
