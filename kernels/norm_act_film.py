"""Group norm, activation and FiLM: all that happens between two convolutions of a conditional U-Net.

For x [B, C, L], of which a group is C / groups channels of one sample (Wu and He 2018; Perez et al. 2018):

    n = (x - mean) / sqrt(var + eps)        mean and biased variance of the group; n = x without a norm
    u = weight n + bias                     weight, bias per channel
    y = scale act(u) + shift                scale, shift per sample and channel; or act(u) + shift, or act(u)

The backward pass keeps the inputs alone and computes n and u again. With g = d loss / d y, sums over L, and over the
samples for what they share,

    d shift = sum g             d scale = sum g act(u)
    d u = g scale act'(u)       d bias = sum d u            d weight = sum n d u
    d n = weight d u            d x = (d n - mean(d n) - n mean(n d n)) / sqrt(var + eps)       means over the group
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo_fast.kernels import mlp_chain
from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels._triton import as_rows, jit, row_tile, tl
from dppo_fast.kernels.mlp_step import activate

ACTIVATIONS = {**mlp_chain.ACTIVATIONS, "SiLU": F.silu}

_REAL, _HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
DTYPES = {"reference": (_REAL, _REAL + _HALF), "triton": (_REAL[:1], _REAL[:1] + _HALF)}
"""By backend: what weight and bias may be, and what x and film may be."""

LARGEST_GROUP = 2048
"""Numbers, its sizes rounded up to powers of two, that a program keeps in registers."""


def norm_act_film_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    film: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> Tensor:
    """`norm_act_film` in plain PyTorch: the specification."""
    h = x if x.dtype == torch.float64 else x.float()
    if weight is not None:
        h = torch.group_norm(h, groups, weight, bias, eps)
    h = ACTIVATIONS[activation](h)
    if film is None:
        return h
    if film.shape[1] == h.shape[1]:
        return h + film.unsqueeze(-1)
    scale, shift = film.unsqueeze(-1).chunk(2, dim=1)
    return torch.addcmul(shift, scale, h)


@jit
def _slope(u, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation's derivative."""
    if ACTIVATION == "ReLU":
        u = tl.where(u <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "Mish":  # of u n / (n + 2), as in the activation
        e = tl.exp(tl.minimum(u, 20.0))
        n = e * (e + 2.0)
        u = (n + 4.0 * u * (e * (e + 1.0) / (n + 2.0))) / (n + 2.0)
    elif ACTIVATION == "SiLU":
        s = tl.sigmoid(u)
        u = s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == "Tanh":
        e = tl.exp(-2.0 * tl.abs(u))
        u = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif ACTIVATION == "GELU":
        u = 0.5 * (1.0 + tl.erf(0.7071067811865476 * u)) + 0.3989422804014327 * u * tl.exp(-0.5 * u * u)
    elif ACTIVATION == "ELU":
        u = tl.where(u < 0.0, tl.exp(tl.minimum(u, 0.0)), 1.0)
    elif ACTIVATION == "Softplus":
        u = tl.sigmoid(u)
    else:
        u = tl.full(u.shape, 1.0, tl.float32)
    return u


@jit
def _tile(  # type: ignore[no-untyped-def]
    B,
    C: tl.constexpr,
    L: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The program's samples [ROWS, 1, 1] and channels [1, CHANNELS, 1], which of both are there, and the offsets into
    x [ROWS, CHANNELS, LENGTH] with those inside.
    """
    sample = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    within = tl.arange(0, CHANNELS)[None, :, None]
    position = tl.arange(0, LENGTH)[None, None, :]
    channel = tl.program_id(1) * GROUP + within
    there = (sample < B) & (within < GROUP)
    return sample, channel, there, (sample * C + channel) * L + position, there & (position < L)


@jit
def _group_mean(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of x [ROWS, CHANNELS, LENGTH], 0 where nothing is: [ROWS, 1, 1]."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True) / SIZE


@jit
def _normalise(x, inside, eps, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """n, and 1 / sqrt(var + eps) of each group."""
    n = tl.where(inside, x - _group_mean(x, SIZE), 0.0)
    rstd = 1.0 / tl.sqrt(_group_mean(n * n, SIZE) + eps)
    return tl.where(inside, n * rstd, 0.0), rstd


@jit
def _norm_act_film_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    film,
    y,
    B,
    eps,
    FILM_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    sample, channel, there, offset, inside = _tile(B, C, L, GROUP, ROWS, CHANNELS, LENGTH)
    h = tl.load(x + offset, inside, 0.0).to(tl.float32)
    if weight is not None:
        h, _ = _normalise(h, inside, eps, GROUP * L)
        h = h * tl.load(weight + channel, channel < C, 0.0) + tl.load(bias + channel, channel < C, 0.0)
    h = activate(h, ACTIVATION)
    if film is not None:
        at = film + sample * FILM_STRIDE + channel
        if SCALED:
            h = h * tl.load(at, there, 0.0).to(tl.float32) + tl.load(at + C, there, 0.0).to(tl.float32)
        else:
            h = h + tl.load(at, there, 0.0).to(tl.float32)
    tl.store(y + offset, h, inside)


@jit
def _norm_act_film_backward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    film,
    grad,
    d_x,
    d_weight,
    d_bias,
    d_film,
    B,
    eps,
    FILM_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    sample, channel, there, offset, inside = _tile(B, C, L, GROUP, ROWS, CHANNELS, LENGTH)
    g = tl.load(grad + offset, inside, 0.0)
    n = tl.load(x + offset, inside, 0.0).to(tl.float32)
    u = n
    if weight is not None:
        n, rstd = _normalise(n, inside, eps, GROUP * L)
        gain = tl.load(weight + channel, channel < C, 0.0)
        u = n * gain + tl.load(bias + channel, channel < C, 0.0)
    if d_film is not None:
        if SCALED:
            at = d_film + sample * (2 * C) + channel
            tl.store(at, tl.sum(g * activate(u, ACTIVATION), 2, keep_dims=True), there)
            tl.store(at + C, tl.sum(g, 2, keep_dims=True), there)
        else:
            tl.store(d_film + sample * C + channel, tl.sum(g, 2, keep_dims=True), there)
    if SCALED:
        g = g * tl.load(film + sample * FILM_STRIDE + channel, there, 0.0).to(tl.float32)
    g = g * _slope(u, ACTIVATION)
    if weight is not None:
        if d_weight is not None:
            at = tl.program_id(0).to(tl.int64) * C + channel
            own = tl.arange(0, CHANNELS)[None, :, None] < GROUP
            tl.store(d_weight + at, tl.sum(tl.sum(g * n, 2, keep_dims=True), 0, keep_dims=True), own)
            tl.store(d_bias + at, tl.sum(tl.sum(g, 2, keep_dims=True), 0, keep_dims=True), own)
        g = g * gain
        g = rstd * (g - _group_mean(g, GROUP * L) - n * _group_mean(g * n, GROUP * L))
    if d_x is not None:
        tl.store(d_x + offset, g, inside)


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _launch_config(
    x: Tensor, film: Tensor | None, groups: int, activation: str
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, in which a program has one group of some samples, and what both kernels are compiled for."""
    B, C, L = x.shape
    channels, length = _padded(C // groups), _padded(L)
    tile = row_tile(channels * length)
    return (-(-B // tile.ROWS), groups), {
        "FILM_STRIDE": 0 if film is None else film.stride(0),
        "SCALED": film is not None and film.shape[1] != C,
        "ACTIVATION": activation,
        "C": C,
        "L": L,
        "GROUP": C // groups,
        "ROWS": tile.ROWS,
        "CHANNELS": channels,
        "LENGTH": length,
        "num_warps": tile.num_warps,
    }


class _NormActFilm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        film: Tensor | None,
        groups: int,
        eps: float,
        activation: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, film)
        ctx.options = groups, eps, activation
        y = torch.empty(x.shape, device=x.device)
        grid, sizes = _launch_config(x, film, groups, activation)
        _norm_act_film_kernel[grid](x, weight, bias, film, y, len(x), eps, **sizes)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # the gradient will be differentiated
            y = norm_act_film_reference(*inputs, *ctx.options)
            leaves = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(y, leaves, grad, create_graph=True))
            return *(next(found) if want else None for want in wanted), None, None, None
        x, weight, bias, film = inputs
        groups, eps, activation = ctx.options
        grid, sizes = _launch_config(x, film, groups, activation)
        by_x, by_weight, by_bias, by_film = wanted
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if by_x else None
        d_film = torch.empty(film.shape, dtype=film.dtype, device=x.device) if by_film else None
        d_norm = torch.empty(2, grid[0], x.shape[1], device=x.device) if by_weight or by_bias else None
        parts = (None, None) if d_norm is None else d_norm
        _norm_act_film_backward_kernel[grid](
            x, weight, bias, film, grad.contiguous(), d_x, *parts, d_film, len(x), eps, **sizes
        )
        d_weight, d_bias = (None, None) if d_norm is None else d_norm.sum(1)
        return d_x, d_weight, d_bias, d_film, None, None, None


def _norm_act_film_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    film: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> Tensor:
    dense = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    rows = None if film is None else as_rows(film)
    y: Tensor = _NormActFilm.apply(x.contiguous(), *dense, rows, groups, eps, activation)  # type: ignore[no-untyped-call]
    return y


def norm_act_film(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    film: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "Mish",
    backend: Backend | None = None,
) -> Tensor:
    """y [B, C, L] for ``x`` [B, C, L].

    ``weight`` and ``bias`` [C], or None for no norm. ``film`` [B, C] is the shift, [B, 2 C] scale and shift, None
    neither. All are differentiable, also twice. ``x`` and ``film`` may be bfloat16 or float16; the result is float32,
    or with the reference float64 where ``x`` is. Triton is for groups of up to `LARGEST_GROUP` numbers.

    Raises TypeError for another dtype, ValueError for another shape, device or activation, and what ``resolve``
    raises.
    """
    if x.ndim != 3 or x.shape[1] % groups:
        raise ValueError(f"norm_act_film: x has shape {tuple(x.shape)}, expected [B, C, L], C divisible by {groups=}")
    if (weight is None) != (bias is None):
        raise ValueError("norm_act_film: weight and bias, expected both or neither")
    if activation not in ACTIVATIONS:
        raise ValueError(f"norm_act_film: {activation=}, expected one of {', '.join(ACTIVATIONS)}")
    (B, C, L), device = x.shape, x.device
    fits = _padded(C // groups) * _padded(L) <= LARGEST_GROUP
    backends: tuple[Backend, ...] = ("reference", "triton") if fits else ("reference",)
    chosen = resolve("norm_act_film", device, backends, backend)
    real, any_float = DTYPES[chosen]
    check_tensor("norm_act_film", "x", x, (B, C, L), any_float, device)
    if weight is not None and bias is not None:
        check_tensor("norm_act_film", "weight", weight, (C,), real, device)
        check_tensor("norm_act_film", "bias", bias, (C,), real, device)
    if film is not None:
        width = 2 * C if film.shape[-1] == 2 * C else C
        check_tensor("norm_act_film", "film", film, (B, width), any_float, device)
    run = _norm_act_film_triton if chosen == "triton" else norm_act_film_reference
    return run(x, weight, bias, film, groups, eps, activation)
