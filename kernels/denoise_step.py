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

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels._triton import as_rows, clamp, jit, row_tile, tl
from dppo_fast.kernels.philox import keyed_normal_reference, normal_rows

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


class NoiseKey(NamedTuple):
    """What the noise of a step depends on (`keyed_normal`): draw ``draw`` of environments ``env`` [B] at their steps
    ``step`` [B], both int64.
    """

    seed: int
    env: Tensor
    step: Tensor
    draw: int


class Bounds(NamedTuple):
    """Symmetric bounds of a sampling step on x0, the recomputed eps, the draw z and x'; None does not bound."""

    x0: float | None = None
    eps: float | None = None
    randn: float | None = None
    out: float | None = None


class Score(NamedTuple):
    """How a sampling step's result is scored: the floor of L, and how many steps of the chunk count."""

    min_std: float
    reward_horizon: int


def sampling_step_reference(
    eps: Tensor,
    x: Tensor,
    noise: Tensor | NoiseKey,
    c: Coefficients,
    std: Tensor,
    bounds: Bounds,
    score: Score | None = None,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`sampling_step` in plain PyTorch: the specification."""
    if isinstance(noise, NoiseKey):
        seed, env, step, draw = noise
        noise = keyed_normal_reference(seed, env, step, 1, x[0].numel(), draw).view(x.shape)
    if bounds.randn is not None:
        noise = noise.clamp(-bounds.randn, bounds.randn)
    x_next, mean = denoise_step(eps.to(x.dtype), x, noise, c, std, bounds.x0, bounds.eps, bounds.out)
    log_prob = None
    if score is not None:
        density = gaussian_log_density(x_next, mean, c.std.clamp(min=score.min_std))
        log_prob = chunk_log_prob(density, score.reward_horizon)
        log_prob = log_prob if log_prob_out is None else log_prob_out.copy_(log_prob)
    return x_next if out is None else out.copy_(x_next), log_prob


@jit
def load_coefficients(  # type: ignore[no-untyped-def]
    cx, ce, m0, mx, std, sa, s, row, dim, ROW_STRIDE, ETA_ROW_STRIDE, ETA_DIM_STRIDE
):
    """cx, ce, sa, s [ROWS, 1] and m0, mx, std [ROWS, BLOCK or 1], of ``row`` [ROWS, 1] and ``dim`` [1, BLOCK]."""
    shared = row * ROW_STRIDE
    own = row * ETA_ROW_STRIDE
    if ETA_DIM_STRIDE != 0:
        own += dim * ETA_DIM_STRIDE
    return (
        tl.load(cx + shared),
        tl.load(ce + shared),
        tl.load(m0 + own),
        tl.load(mx + own),
        tl.load(std + own),
        tl.load(sa + shared),
        tl.load(s + shared),
    )


@jit
def transition(eps, x, cx, ce, sa, s, m0, mx, x0_clip, eps_clip):  # type: ignore[no-untyped-def]
    """`posterior_mean` and its derivatives by eps, m0 and mx. A clip passes the gradient at its bounds, as PyTorch's
    does.
    """
    x0 = cx * x + ce * eps
    d_x0 = m0
    d_eps = ce
    if x0_clip is not None:
        d_eps = tl.where(tl.abs(x0) <= x0_clip, ce, 0.0)
        x0 = clamp(x0, x0_clip)
    d_mx = x
    if eps_clip is not None:
        implied = (x - sa * x0) / s
        d_x0 = tl.where(tl.abs(implied) <= eps_clip, m0, m0 + mx * sa)
        d_mx = sa * x0 + s * clamp(implied, eps_clip)
    return m0 * x0 + mx * d_mx, d_x0 * d_eps, x0, d_mx


@jit
def element_log_density(x, mean, std):  # type: ignore[no-untyped-def]
    """`gaussian_log_density`, clamped to LOG_PROB_RANGE, and its derivatives by mean and std."""
    z = (x - mean) / std
    density = -0.5 * z * z - tl.log(std) - 0.9189385332046727  # log(2 pi) / 2
    free = (density >= -5.0) & (density <= 2.0)
    clamped = tl.clamp(density, -5.0, 2.0, propagate_nan=tl.PropagateNan.ALL)
    return clamped, tl.where(free, z / std, 0.0), tl.where(free, (z * z - 1.0) / std, 0.0)


@jit(do_not_specialize=["seed", "draw"], do_not_specialize_on_alignment=[*Coefficients._fields, "scale", "log_prob"])
def _sampling_step_kernel(  # type: ignore[no-untyped-def]
    eps,
    x,
    noise,
    seed,
    env,
    step,
    draw,
    cx,
    ce,
    m0,
    mx,
    std,
    sa,
    s,
    scale,
    x_next,
    log_prob,
    B,
    x0_clip,
    eps_clip,
    randn_clip,
    out_clip,
    min_std,
    X_STRIDE: tl.constexpr,
    NEXT_STRIDE: tl.constexpr,
    LOG_PROB_STRIDE: tl.constexpr,
    SCALE_ROW_STRIDE: tl.constexpr,
    SCALE_DIM_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ETA_ROW_STRIDE: tl.constexpr,
    ETA_DIM_STRIDE: tl.constexpr,
    DA: tl.constexpr,
    SIZE: tl.constexpr,
    SCORED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = tl.arange(0, BLOCK)[None, :]
    dim = element % DA
    inside = row < B
    stored = inside[:, None] & (element < SIZE)
    row = tl.minimum(row, B - 1)  # rows beyond the last repeat it, and are not stored
    offset = row[:, None] * SIZE + element
    eps_ = tl.load(eps + offset, mask=stored, other=0.0).to(tl.float32)
    x_ = tl.load(x + row[:, None] * X_STRIDE + element, mask=stored, other=0.0)
    if noise is None:
        z = normal_rows(seed, tl.load(env + row), tl.load(step + row), draw, BLOCK)
    else:
        z = tl.load(noise + offset, mask=stored, other=0.0)

    cx_, ce_, m0_, mx_, std_, sa_, s_ = load_coefficients(
        cx, ce, m0, mx, std, sa, s, row[:, None], dim, ROW_STRIDE, ETA_ROW_STRIDE, ETA_DIM_STRIDE
    )
    mean, _, _, _ = transition(eps_, x_, cx_, ce_, sa_, s_, m0_, mx_, x0_clip, eps_clip)
    scale_ = tl.load(scale + row[:, None] * SCALE_ROW_STRIDE + dim * SCALE_DIM_STRIDE)
    next_ = clamp(mean + scale_ * clamp(z, randn_clip), out_clip)
    tl.store(x_next + row[:, None] * NEXT_STRIDE + element, next_, mask=stored)
    if log_prob is not None:
        density, _, _ = element_log_density(next_, mean, tl.maximum(std_, min_std))
        mean_density = tl.sum(tl.where(element < SCORED, density, 0.0), 1) / SCORED
        tl.store(log_prob + row * LOG_PROB_STRIDE, mean_density, mask=inside)


def coefficient_rows(c: Coefficients, batch: int, dims: int) -> tuple[Coefficients, dict[str, int]]:
    """The tensors and the strides with which `load_coefficients` finds the coefficients of each row."""
    shared, (row, _) = _broadcast([c.cx, c.ce, c.sa, c.s], batch, 1)
    own, (eta_row, eta_dim) = _broadcast([c.m0, c.mx, c.std], batch, dims)
    (cx, ce, sa, s), (m0, mx, std) = shared, own
    strides = {"ROW_STRIDE": row, "ETA_ROW_STRIDE": eta_row, "ETA_DIM_STRIDE": eta_dim}
    return Coefficients(cx, ce, m0, mx, std, sa, s), strides


def _broadcast(tensors: list[Tensor], batch: int, dims: int) -> tuple[list[Tensor], tuple[int, int]]:
    """``tensors`` as [batch, 1, dims] and the strides of its first and last dimension, which are the same for all."""
    expanded = [tensor.expand(batch, 1, dims) for tensor in tensors]
    if len({(tensor.stride(0), tensor.stride(2)) for tensor in expanded}) > 1:
        expanded = [tensor.contiguous() for tensor in expanded]
    return expanded, (expanded[0].stride(0), expanded[0].stride(2))


def _sampling_step_triton(
    eps: Tensor,
    x: Tensor,
    noise: Tensor | NoiseKey,
    c: Coefficients,
    std: Tensor,
    bounds: Bounds,
    score: Score | None = None,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    B, Th, Da = x.shape
    x_next = torch.empty(x.shape, device=x.device) if out is None else out
    min_std, horizon = (0.0, Th) if score is None else score
    log_prob = None if score is None else torch.empty(B, device=x.device) if log_prob_out is None else log_prob_out
    z, key = (None, noise) if isinstance(noise, NoiseKey) else (noise.contiguous(), (0, None, None, 0))
    c, strides = coefficient_rows(c, B, Da)
    (scale,), (scale_row, scale_dim) = _broadcast([std], B, Da)
    x_rows, next_rows = as_rows(x), as_rows(x_next)
    if next_rows.data_ptr() != x_next.data_ptr():
        raise ValueError(f"sampling_step: out has strides {x_next.stride()}, expected (any, {Da}, 1)")
    tile = row_tile(Th * Da)
    _sampling_step_kernel[(-(-B // tile.ROWS),)](
        eps.contiguous(),
        x_rows,
        z,
        *key,
        *c,
        scale,
        next_rows,
        log_prob,
        B,
        *bounds,
        min_std,
        X_STRIDE=x_rows.stride(0),
        NEXT_STRIDE=next_rows.stride(0),
        LOG_PROB_STRIDE=0 if log_prob is None else log_prob.stride(0),
        SCALE_ROW_STRIDE=scale_row,
        SCALE_DIM_STRIDE=scale_dim,
        **strides,
        DA=Da,
        SIZE=Th * Da,
        SCORED=min(horizon, Th) * Da,
        **tile._asdict(),
    )
    return x_next, log_prob


@torch.no_grad()
def sampling_step(
    eps: Tensor,
    x: Tensor,
    noise: Tensor | NoiseKey,
    c: Coefficients,
    std: Tensor,
    bounds: Bounds,
    score: Score | None = None,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A step of the chain as it is sampled: (x' [B, Th, Da], lp [B], or None without ``score``), without gradients.

    Args:
        noise: the draw z [B, Th, Da], or the key of which to make it: element (t, d) is then dimension t Da + d.
        std: sampling std (c.std with its floor, or 0), 0-d or [B, 1, 1 or Da].
        bounds: x' is scored after its bound.
        out: where x' goes, such as a point ``chain[:, j]`` of a chain; may be ``x``.
        log_prob_out: where lp goes.

    With Triton all is float32, but for ``eps``, which may be bfloat16 or float16.

    Raises TypeError for another dtype, ValueError for another shape, device or layout of ``out``, and what ``resolve``
    raises.
    """
    chosen = resolve("sampling_step", x.device, ("reference", "triton"), backend)
    if x.ndim != 3:
        raise ValueError(f"sampling_step: x has shape {tuple(x.shape)}, expected [B, Th, Da]")
    shape, batch = tuple(x.shape), tuple(x.shape[:1])
    real = (torch.float32,) if chosen == "triton" else (x.dtype,)
    arguments = {"eps": (eps, shape, (*real, torch.bfloat16, torch.float16)), "x": (x, shape, real)}
    if isinstance(noise, NoiseKey):
        arguments |= {"env": (noise.env, batch, (torch.int64,)), "step": (noise.step, batch, (torch.int64,))}
    else:
        arguments["noise"] = noise, shape, real
    if out is not None:
        arguments["out"] = out, shape, real
    if log_prob_out is not None:
        arguments["log_prob_out"] = log_prob_out, batch, real
    for name, (tensor, expected, dtypes) in arguments.items():
        check_tensor("sampling_step", name, tensor, expected, dtypes, x.device)
    run = _sampling_step_triton if chosen == "triton" else sampling_step_reference
    return run(eps, x, noise, c, std, bounds, score, out, log_prob_out)
