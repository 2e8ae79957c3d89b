"""The conditional 1-D U-Net over the action chunk's time axis (Janner et al. 2022; Chi et al. 2023).

Parameter names are the reference's, so that its checkpoints load with strict=True.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dppo_fast.kernels.norm_act_film import norm_act_film
from dppo_fast.networks.embed import SinusoidalPosEmb, activation
from dppo_fast.networks.mlp import ResidualMLP
from dppo_fast.types import Obs, UserError


class ConvBlock(nn.Module):
    """Convolution, [GroupNorm], activation, [FiLM]: [B, n_in, L] -> [B, n_out, L]."""

    def __init__(
        self, n_in: int, n_out: int, kernel_size: int, n_groups: int | None, groupnorm_eps: float, activation_type: str
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(n_in, n_out, kernel_size, padding=kernel_size // 2),
            nn.Identity(),  # a reshape in the reference, which counts in the parameter names
            nn.GroupNorm(n_groups, n_out, groupnorm_eps) if n_groups else nn.Identity(),
            activation(activation_type),
        )
        self.groups, self.eps, self.activation_type = n_groups or 1, groupnorm_eps, activation_type

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """``film`` [B, n_out] is added to each channel; of [B, 2 n_out] the first half multiplies it before."""
        conv, _, norm, _ = self.block
        weight, bias = (norm.weight, norm.bias) if isinstance(norm, nn.GroupNorm) else (None, None)
        return norm_act_film(conv(x), weight, bias, film, self.groups, self.eps, self.activation_type)


class ResidualBlock1D(nn.Module):
    """conv2(film(conv1(x))) + x, where film(h) is scale * h + bias, or h + bias, per channel (Perez et al. 2018).

    scale and bias come from ``cond_encoder`` over [time embedding, observation]: three linear layers if
    ``larger_encoder``, else an activation and one. ``forward`` is given the output of its ``first`` layer.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        cond_dim: int,
        conv: Callable[[int, int], nn.Module],
        activation_type: str,
        cond_predict_scale: bool,
        larger_encoder: bool,
    ) -> None:
        super().__init__()
        self.film_dim = n_out * (2 if cond_predict_scale else 1)
        self.cond_predict_scale = cond_predict_scale
        self.blocks = nn.ModuleList([conv(n_in, n_out), conv(n_out, n_out)])
        first, act = nn.Linear(cond_dim, self.film_dim), partial(activation, activation_type)
        if larger_encoder:
            hidden, last = (nn.Linear(self.film_dim, self.film_dim) for _ in range(2))
            self.cond_encoder = nn.Sequential(first, act(), hidden, act(), last)
        else:
            self.cond_encoder = nn.Sequential(act(), first)
        self.position = 0 if larger_encoder else 1
        self.residual_conv = nn.Identity() if n_in == n_out else nn.Conv1d(n_in, n_out, 1)

    @property
    def first(self) -> nn.Linear:
        """The encoder's layer that sees the condition."""
        linear = self.cond_encoder[self.position]
        assert isinstance(linear, nn.Linear)
        return linear

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, n_in, L], film [B, film_dim] -> [B, n_out, L]."""
        for layer in list(self.cond_encoder)[self.position + 1 :]:
            film = layer(film)
        first, second = self.blocks
        out: Tensor = second(first(x, film)) + self.residual_conv(x)
        return out


class Level(nn.ModuleList):
    """Two residual blocks and a change of resolution."""

    def forward(self, x: Tensor, films: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """The features at this resolution, and at the next."""
        first, second, resample = self
        h = second(first(x, next(films)), next(films))
        return h, resample(h)


def resampling(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv))


class Unet1D(nn.Module):
    """Denoising network: (x_t, t, obs) -> eps or x0, by convolutions over the chunk's steps.

    Time and observation enter through the FiLM encoders of the residual blocks alone. Their first linear layers, split
    by columns as in `DiffusionMLP`, are one matrix product for all blocks: once per chain over the observation
    (``encode_obs``), once per denoising step over the time embedding (``time_table``). ``visual_dim`` is what a
    subclass's ``features`` adds.

    Raises UserError for a horizon that cannot be halved ``len(dim_mults) - 1`` times, an even kernel, channels that
    ``n_groups`` does not divide, or an odd number of ``cond_mlp_dims``, which is a residual MLP's.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        diffusion_step_embed_dim: int = 32,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        smaller_encoder: bool = False,
        cond_mlp_dims: Sequence[int] | None = None,
        kernel_size: int = 5,
        n_groups: int | None = None,
        activation_type: str = "Mish",
        cond_predict_scale: bool = False,
        groupnorm_eps: float = 1e-5,
        *,
        visual_dim: int = 0,
    ) -> None:
        super().__init__()
        widths = [dim * mult for mult in dim_mults]
        halvings = len(widths) - 1
        if horizon_steps % 2**halvings:
            raise UserError(
                f"horizon_steps={horizon_steps} must be divisible by {2**halvings}, as dim_mults={list(dim_mults)} "
                f"halves it {halvings} times"
            )
        if kernel_size % 2 == 0:
            raise UserError(f"kernel_size={kernel_size} must be odd")
        if n_groups and any(width % n_groups for width in widths):
            raise UserError(f"n_groups={n_groups} must divide all channels, which are dim * dim_mults={widths}")
        if cond_mlp_dims and len(cond_mlp_dims) % 2:
            raise UserError(f"cond_mlp_dims={list(cond_mlp_dims)} must have an even number of entries")
        time_dim = diffusion_step_embed_dim
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(time_dim), nn.Linear(time_dim, time_dim * 4), nn.Mish(), nn.Linear(time_dim * 4, time_dim)
        )
        self.cond_mlp = ResidualMLP([cond_dim, *cond_mlp_dims], activation_type) if cond_mlp_dims else None
        larger_encoder = not (smaller_encoder or cond_mlp_dims)
        self.cond_act = nn.Identity() if larger_encoder else activation(activation_type)
        self.cond_dims = [time_dim, visual_dim + (cond_mlp_dims[-1] if cond_mlp_dims else cond_dim)]

        conv = partial(
            ConvBlock,
            kernel_size=kernel_size,
            n_groups=n_groups,
            groupnorm_eps=groupnorm_eps,
            activation_type=activation_type,
        )
        block = partial(
            ResidualBlock1D,
            cond_dim=sum(self.cond_dims),
            conv=conv,
            activation_type=activation_type,
            cond_predict_scale=cond_predict_scale,
            larger_encoder=larger_encoder,
        )
        self.down_modules = nn.ModuleList()
        for n_in, n_out in pairwise([action_dim, *widths]):
            last = len(self.down_modules) == halvings
            resample = nn.Identity() if last else resampling(nn.Conv1d(n_out, n_out, 3, stride=2, padding=1))
            self.down_modules.append(Level([block(n_in, n_out), block(n_out, n_out), resample]))
        self.mid_modules = nn.ModuleList([block(widths[-1], widths[-1]) for _ in range(2)])
        self.up_modules = nn.ModuleList()
        for n_in, n_out in pairwise(reversed(widths)):
            resample = resampling(nn.ConvTranspose1d(n_out, n_out, 4, stride=2, padding=1))
            self.up_modules.append(Level([block(2 * n_in, n_out), block(n_out, n_out), resample]))
        self.final_conv = nn.Sequential(conv(widths[0], widths[0]), nn.Conv1d(widths[0], action_dim, 1))
        self.film_dims = [block.film_dim for block in self._blocks()]

    def features(self, obs: Obs) -> Tensor:
        """What the network sees of the observation: the flattened state, through ``cond_mlp`` where there is one."""
        state = obs["state"].flatten(1)
        return state if self.cond_mlp is None else self.cond_mlp(state)

    def encode_obs(self, obs: Obs) -> Tensor:
        """The observation's share of the FiLM encoders' first layers, bias included: [B, H]."""
        bias = torch.cat([block.first.bias for block in self._blocks()])
        return F.linear(self.cond_act(self.features(obs)), self._columns(1), bias)

    def time_table(self, t: Tensor) -> Tensor:
        """The time's share of the FiLM encoders' first layers for timesteps ``t`` [n]: [n, H]."""
        return F.linear(self.cond_act(self.time_mlp(t)), self._columns(0))

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        """x [B, Th, Da], a row or rows of ``time_table`` [H] or [B, H], ``encode_obs`` [B, H] -> [B, Th, Da]."""
        films = iter(torch.split(obs + time, self.film_dims, dim=-1))
        h = x.transpose(1, 2)
        skips = []
        for level in self.down_modules:
            skip, h = level(h, films)
            skips.append(skip)
        for block in self.mid_modules:
            h = block(h, next(films))
        for level in self.up_modules:
            _, h = level(torch.cat((h, skips.pop()), dim=1), films)
        out: Tensor = self.final_conv(h)
        return out.transpose(1, 2)

    def step(self, t: Tensor) -> None:
        """No op runs a whole chain of it."""

    def forward(self, x: Tensor, t: Tensor, obs: Obs) -> Tensor:
        """x [B, Th, Da], t [B] -> [B, Th, Da]."""
        return self.denoise(x, self.time_table(t), self.encode_obs(obs))

    def _blocks(self) -> list[ResidualBlock1D]:
        """In the order in which they run."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock1D)]

    def _columns(self, part: int) -> Tensor:
        """Those of all FiLM encoders' first layers that see the time embedding (0) or the observation (1)."""
        return torch.cat([torch.split(block.first.weight, self.cond_dims, dim=1)[part] for block in self._blocks()])
