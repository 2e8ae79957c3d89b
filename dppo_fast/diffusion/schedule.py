"""Noise schedules as tables with one row per denoising step, in the order of sampling.

Letters: K the training schedule's length, S the denoising steps sampled, abar the cumulative product of alpha = 1 -
beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dppo_fast.kernels.denoise_step import Coefficients
from dppo_fast.types import UserError

SIGMA_FLOOR = 1e-10
DETERMINISTIC_DDPM_STD_FLOOR = 1e-3


@dataclass(frozen=True)
class CosineSchedule:
    """The forward process (Nichol & Dhariwal 2021, eq. 17), each table [K], t ascending, float32.

    K+1 points reach K+1, so their spacing is (K+1)/K; beta is computed in float64 and the rest in float32 from the
    cast beta.
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor

    @classmethod
    def build(cls, denoising_steps: int) -> CosineSchedule:
        K = denoising_steps
        points = torch.linspace(0, K + 1, K + 1, dtype=torch.float64) / (K + 1)
        alpha_bar = ((points + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999).float()
        alphas = 1 - betas
        cumprod = alphas.cumprod(0)
        return cls(betas, alphas, cumprod, torch.cat((torch.ones(1), cumprod[:-1])))

    @property
    def ddpm_var(self) -> Tensor:
        """Posterior variance beta (1 - abar_prev) / (1 - abar)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def ddpm_logvar_clipped(self) -> Tensor:
        return self.ddpm_var.clamp(min=1e-20).log()

    @property
    def ddpm_mu_coef1(self) -> Tensor:
        """The posterior mean's weight of x0."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @property
    def ddpm_mu_coef2(self) -> Tensor:
        """The posterior mean's weight of x_t."""
        return (1 - self.alphas_cumprod_prev) * self.alphas.sqrt() / (1 - self.alphas_cumprod)


class NoiseSchedule(nn.Module):
    """The reverse process: `table` and `deterministic_table` [S, 7], whose columns are `Coefficients`.

    DDPM visits every timestep of K; DDIM visits ``ddim_steps`` of them with "leading" spacing arange(S) * (K // S) and
    ``eta`` in the stochastic table, 0 in the deterministic one. With DDPM the two tables are equal.
    """

    table: Tensor
    deterministic_table: Tensor
    timesteps: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self, denoising_steps: int, ddim_steps: int | None = None, predict_epsilon: bool = True, eta: float = 1.0
    ) -> None:
        super().__init__()
        if ddim_steps is not None and not 1 <= ddim_steps <= denoising_steps:
            raise UserError(f"ddim_steps={ddim_steps} must lie between 1 and denoising_steps={denoising_steps}")
        self.denoising_steps = denoising_steps
        self.ddim = ddim_steps is not None
        self.steps = ddim_steps or denoising_steps
        forward = CosineSchedule.build(denoising_steps)
        stride = denoising_steps // self.steps
        timesteps = torch.arange(self.steps) * stride
        alpha_bar = forward.alphas_cumprod[timesteps]
        alpha_bar_prev = torch.cat((torch.ones(1), alpha_bar[:-1]))
        tables = {
            "timesteps": timesteps.flip(0),
            "alpha_bar": alpha_bar.flip(0),
            "alpha_bar_prev": alpha_bar_prev.flip(0),
            "sqrt_alphas_cumprod": forward.alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - forward.alphas_cumprod).sqrt(),
        }
        for name, value in tables.items():
            self.register_buffer(name, value, persistent=False)

        sa, s = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        cx = (1 / self.alpha_bar).sqrt() if predict_epsilon else torch.zeros_like(sa)
        ce = -(1 / self.alpha_bar - 1).sqrt() if predict_epsilon else torch.ones_like(sa)
        if self.ddim:
            stochastic, deterministic = self._ddim(torch.tensor(eta)), self._ddim(torch.tensor(0.0))
        else:
            std = (0.5 * forward.ddpm_logvar_clipped).exp()
            stochastic = forward.ddpm_mu_coef1.flip(0), forward.ddpm_mu_coef2.flip(0), std.flip(0)
            deterministic = stochastic
        self.register_buffer("table", torch.stack((cx, ce, *stochastic, sa, s), 1), persistent=False)
        self.register_buffer("deterministic_table", torch.stack((cx, ce, *deterministic, sa, s), 1), persistent=False)

    def _ddim(self, eta: Tensor, k: int | Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """m0, mx, std of steps k: sigma = eta sqrt((1-a')/(1-a) (1 - a/a')), direction = sqrt(1 - a' - sigma^2)."""
        a, a_prev = self.alpha_bar[k], self.alpha_bar_prev[k]
        if eta.dim() > 0:
            a, a_prev = a[..., None, None], a_prev[..., None, None]
        sigma = (eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()).clamp(min=SIGMA_FLOOR)
        direction = (1 - a_prev - sigma.square()).clamp(min=0).sqrt()
        s = (1 - a).sqrt()
        return a_prev.sqrt() - direction * a.sqrt() / s, direction / s, sigma

    def coefficients(self, k: int | Tensor, deterministic: bool = False, eta: Tensor | None = None) -> Coefficients:
        """Steps ``k`` (an index into the order of sampling, or [B] of them); ``eta`` [B, 1 or Da] replaces the
        table's.
        """
        table = self.deterministic_table if deterministic else self.table
        columns = table[k] if isinstance(k, int) else table[k][:, None, None]  # [7] or [B, 1, 1, 7]
        row = Coefficients(*columns.unbind(-1))
        if eta is None or deterministic:
            return row
        m0, mx, std = self._ddim(eta[:, None], k)
        return row._replace(m0=m0, mx=mx, std=std)

    def deterministic_std(self) -> Tensor:
        """[S]: 0 for DDIM; for DDPM the posterior's with a floor, and 0 at the last step only."""
        if self.ddim:
            return torch.zeros_like(self.table[:, 4])
        std = self.table[:, 4].clamp(min=DETERMINISTIC_DDPM_STD_FLOOR)
        std[-1].zero_()
        return std

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The forward process at timesteps ``t`` [B]: sqrt(abar) x0 + sqrt(1 - abar) noise, [B, Th, Da]."""
        shape = (-1, 1, 1)
        return self.sqrt_alphas_cumprod[t].view(shape) * x0 + self.sqrt_one_minus_alphas_cumprod[t].view(shape) * noise
