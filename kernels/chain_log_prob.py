"""The log-prob of transitions x -> x' of a denoising chain, which may each be at a step of their own.

    lp = mean over the first reward_horizon steps and all action dims of
         clip(log N(x'; mean(eps, x), max(std, min_std)^2), -5, 2)

with the mean of `denoise_step` (Ren et al. 2024, arXiv 2409.00588). The gradient is computed along with lp; per
element, with z = (x' - mean) / L, L = max(std, min_std) and n elements in the mean:

    d lp / d mean  = z / (L n)                              0 where lp is clipped
    d lp / d std   = (z^2 - 1) / (L n) [std >= min_std]     0 where lp is clipped
    d mean / d eps = m0 ce [x0 within its clip],  d mean / d m0 = x0,  d mean / d mx = x

(with eps_clip: d mean / d eps = (m0 + mx sa) ce where the recomputed eps is clipped, and eps instead of x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels._triton import as_rows, jit, row_tile, tl, with_gradients
from dppo_fast.kernels.denoise_step import (
    Coefficients,
    chunk_log_prob,
    coefficient_rows,
    element_log_density,
    gaussian_log_density,
    load_coefficients,
    posterior_mean,
    transition,
)


def chain_log_prob_reference(
    eps: Tensor,
    x: Tensor,
    x_next: Tensor,
    c: Coefficients,
    min_std: float,
    reward_horizon: int,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
) -> Tensor:
    """`chain_log_prob` in plain PyTorch: the specification."""
    mean = posterior_mean(eps.to(x.dtype), x, c, x0_clip, eps_clip)
    return chunk_log_prob(gaussian_log_density(x_next, mean, c.std.clamp(min=min_std)), reward_horizon)


@jit
def score_transition(  # type: ignore[no-untyped-def]
    eps, x, x_next, cx, ce, m0, mx, std, sa, s, element, min_std, x0_clip, eps_clip, SCORED: tl.constexpr
):
    """lp [ROWS] and, each [ROWS, BLOCK], its derivatives by eps, m0, mx and std, from the loaded values."""
    mean, mean_by_eps, mean_by_m0, mean_by_mx = transition(eps, x, cx, ce, sa, s, m0, mx, x0_clip, eps_clip)
    density, by_mean, by_std = element_log_density(x_next, mean, tl.maximum(std, min_std))
    by_mean = tl.where(element < SCORED, by_mean, 0.0) / SCORED
    by_std = tl.where((element < SCORED) & (std >= min_std), by_std, 0.0) / SCORED
    log_prob = tl.sum(tl.where(element < SCORED, density, 0.0), 1) / SCORED
    return log_prob, by_mean * mean_by_eps, by_mean * mean_by_m0, by_mean * mean_by_mx, by_std


@jit(do_not_specialize_on_alignment=Coefficients._fields)
def _chain_log_prob_kernel(  # type: ignore[no-untyped-def]
    eps,
    x,
    x_next,
    cx,
    ce,
    m0,
    mx,
    std,
    sa,
    s,
    log_prob,
    d_eps,
    d_m0,
    d_mx,
    d_std,
    B,
    min_std,
    x0_clip,
    eps_clip,
    X_STRIDE: tl.constexpr,
    NEXT_STRIDE: tl.constexpr,
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
    inside = row < B
    stored = inside[:, None] & (element < SIZE)
    row = tl.minimum(row, B - 1)  # rows beyond the last repeat it, and are not stored
    offset = row[:, None] * SIZE + element
    cx_, ce_, m0_, mx_, std_, sa_, s_ = load_coefficients(
        cx, ce, m0, mx, std, sa, s, row[:, None], element % DA, ROW_STRIDE, ETA_ROW_STRIDE, ETA_DIM_STRIDE
    )
    lp, by_eps, by_m0, by_mx, by_std = score_transition(
        tl.load(eps + offset, mask=stored, other=0.0).to(tl.float32),
        tl.load(x + row[:, None] * X_STRIDE + element, mask=stored, other=0.0),
        tl.load(x_next + row[:, None] * NEXT_STRIDE + element, mask=stored, other=0.0),
        cx_,
        ce_,
        m0_,
        mx_,
        std_,
        sa_,
        s_,
        element,
        min_std,
        x0_clip,
        eps_clip,
        SCORED,
    )
    tl.store(log_prob + row, lp, mask=inside)
    if d_eps is not None:
        tl.store(d_eps + offset, by_eps, mask=stored)
    if d_m0 is not None:
        tl.store(d_m0 + offset, by_m0, mask=stored)
    if d_mx is not None:
        tl.store(d_mx + offset, by_mx, mask=stored)
    if d_std is not None:
        tl.store(d_std + offset, by_std, mask=stored)


def _chain_log_prob_triton(
    eps: Tensor,
    x: Tensor,
    x_next: Tensor,
    c: Coefficients,
    min_std: float,
    reward_horizon: int,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
) -> Tensor:
    B, Th, Da = x.shape
    log_prob = torch.empty(B, device=x.device)
    inputs = (eps, c.m0, c.mx, c.std)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs]
    gradients = [torch.empty(x.shape, device=x.device) if want else None for want in wanted]
    rows, strides = coefficient_rows(c, B, Da)
    x, x_next = as_rows(x), as_rows(x_next)
    tile = row_tile(Th * Da)
    _chain_log_prob_kernel[(-(-B // tile.ROWS),)](
        eps.contiguous(),
        x,
        x_next,
        *rows,
        log_prob,
        *gradients,
        B,
        float(min_std),
        x0_clip,
        eps_clip,
        X_STRIDE=x.stride(0),
        NEXT_STRIDE=x_next.stride(0),
        **strides,
        DA=Da,
        SIZE=Th * Da,
        SCORED=min(reward_horizon, Th) * Da,
        **tile._asdict(),
    )
    return with_gradients(log_prob, [(i, g) for i, g in zip(inputs, gradients, strict=True) if g is not None])


def chain_log_prob(
    eps: Tensor,
    x: Tensor,
    x_next: Tensor,
    c: Coefficients,
    min_std: float,
    reward_horizon: int,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """lp [B] of the transitions x -> x_next, given the network's ``eps`` [B, Th, Da] at x.

    Differentiable with respect to ``eps`` and, where eta is learned, ``c.m0``, ``c.mx`` and ``c.std``; the chain is
    data. With Triton all is float32, but for ``eps``, which may be bfloat16 or float16.

    Raises TypeError for another dtype, ValueError for another shape or device, and what ``resolve`` raises.
    """
    chosen = resolve("chain_log_prob", x.device, ("reference", "triton"), backend)
    check_transitions("chain_log_prob", eps, x, x_next, chosen)
    run = _chain_log_prob_triton if chosen == "triton" else chain_log_prob_reference
    return run(eps, x, x_next, c, min_std, reward_horizon, x0_clip, eps_clip)


def check_transitions(op: str, eps: Tensor, x: Tensor, x_next: Tensor, backend: Backend) -> None:
    """Refuse transitions that are not [B, Th, Da] (ValueError) or of a dtype that ``backend`` does not take
    (TypeError).
    """
    if x.ndim != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [B, Th, Da]")
    real = (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)
    check_tensor(op, "eps", eps, tuple(x.shape), (*real, torch.bfloat16, torch.float16), x.device)
    for name, tensor in {"x": x, "x_next": x_next}.items():
        check_tensor(op, name, tensor, tuple(x.shape), real, x.device)
