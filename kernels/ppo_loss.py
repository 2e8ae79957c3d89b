"""The clipped PPO objective and the clipped value loss (Schulman et al. 2017, eq. 7 and 9).

    r        = exp(lp - lp_old)
    loss_pg  = -mean(min(r A, clip(r, 1 - c, 1 + c) A))
    kl       = mean(r - 1 - log r)                              Schulman 2020, "k3"
    loss_v   = 0.5 mean(max((V - R)^2, (V_old + clip(V - V_old, -cv, cv) - R)^2))

lp [B] log-probs, A [B] advantages, c [B] or scalar clip range, V [B] values, R [B] returns. Of a denoising chain
(`chain_ppo_loss`), lp is `chain_log_prob` at steps k [B], c = clip_table[k] and A is multiplied by weight_table[k].

The kernels compute the gradient in the same pass: d loss_pg / d lp = -A r / B, or 0 where the clip holds it back. Each
program leaves partial sums, which are then added up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels._triton import as_rows, jit, row_tile, tl, with_gradients
from dppo_fast.kernels.chain_log_prob import chain_log_prob_reference, check_transitions, score_transition
from dppo_fast.kernels.denoise_step import Coefficients, load_coefficients

SAMPLES = 512
"""Per program of the kernels that handle one number a sample."""


class PolicyLoss(NamedTuple):
    """0-d tensors; only ``loss`` carries a gradient. ``ratio`` is the mean of r, ``ratio_max`` its maximum."""

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio: Tensor
    ratio_max: Tensor


def exp_minus_one_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series near 0, where the difference cancels in float32 (relative error 1e-6 there)."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    return torch.where(x.abs() < 0.05, series, torch.expm1(x) - x)


def ppo_loss_reference(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: Tensor) -> PolicyLoss:
    """`ppo_loss` in plain PyTorch: the specification."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    with torch.no_grad():
        return PolicyLoss(
            loss,
            approx_kl=exp_minus_one_minus(log_ratio).mean(),
            clip_fraction=((ratio - 1).abs() > clip).float().mean(),
            ratio=ratio.mean(),
            ratio_max=ratio.max(),
        )


def chain_ppo_loss_reference(
    eps: Tensor,
    x: Tensor,
    x_next: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    k: Tensor,
    table: Tensor,
    clip_table: Tensor,
    weight_table: Tensor,
    min_std: float,
    reward_horizon: int,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
) -> PolicyLoss:
    """`chain_ppo_loss` in plain PyTorch: the specification."""
    c = Coefficients(*table[k][:, None, None].unbind(-1))
    log_prob = chain_log_prob_reference(eps, x, x_next, c, min_std, reward_horizon, x0_clip, eps_clip)
    return ppo_loss_reference(log_prob, old_log_prob, advantage * weight_table[k], clip_table[k])


def value_loss_reference(value: Tensor, returns: Tensor, old_value: Tensor, clip: float | None = None) -> Tensor:
    """`value_loss` in plain PyTorch: the specification."""
    error = (value - returns).square()
    if clip is not None:
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * error.mean()


@jit
def _exp_minus_one_minus(x):  # type: ignore[no-untyped-def]
    """As above; the series is long enough for a wider range, beyond which the difference is as exact."""
    terms = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x / 40320)))
    return tl.where(tl.abs(x) < 0.5, x * x * (1 / 2 + x * (1 / 6 + x * terms)), tl.exp(x) - 1.0 - x)


@jit
def _clipped_objective(log_prob, old_log_prob, advantage, clip, inside, partial, B):  # type: ignore[no-untyped-def]
    """Store this program's sums of loss, kl and r, clipped samples and largest r; d loss / d lp of each sample."""
    log_ratio = tl.where(inside, log_prob - old_log_prob, 0.0)
    ratio = tl.exp(log_ratio)
    low, high = 1.0 - clip, 1.0 + clip
    held = tl.minimum(tl.maximum(ratio, low), high)
    free_loss, held_loss = -advantage * ratio, -advantage * held
    loss = tl.maximum(free_loss, held_loss, propagate_nan=tl.PropagateNan.ALL)
    clipped = (tl.abs(ratio - 1.0) > clip).to(tl.float32)
    sums = partial + tl.program_id(0) * 5
    tl.store(sums, tl.sum(tl.where(inside, loss, 0.0)))
    tl.store(sums + 1, tl.sum(_exp_minus_one_minus(log_ratio)))
    tl.store(sums + 2, tl.sum(tl.where(inside, clipped, 0.0)))
    tl.store(sums + 3, tl.sum(tl.where(inside, ratio, 0.0)))
    tl.store(sums + 4, tl.max(tl.where(inside, ratio, 0.0)))
    moves = ((ratio >= low) & (ratio <= high)) | (free_loss > held_loss)
    return tl.where(moves, free_loss / B, 0.0)


@jit
def _ppo_loss_kernel(  # type: ignore[no-untyped-def]
    log_prob, old_log_prob, advantage, clip, partial, d_log_prob, B, CLIP_STRIDE: tl.constexpr, SAMPLES: tl.constexpr
):
    row = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    inside = row < B
    gradient = _clipped_objective(
        tl.load(log_prob + row, mask=inside, other=0.0),
        tl.load(old_log_prob + row, mask=inside, other=0.0),
        tl.load(advantage + row, mask=inside, other=0.0),
        tl.load(clip + row * CLIP_STRIDE, mask=inside, other=0.0),
        inside,
        partial,
        B,
    )
    if d_log_prob is not None:
        tl.store(d_log_prob + row, gradient, mask=inside)


@jit
def _chain_ppo_loss_kernel(  # type: ignore[no-untyped-def]
    eps,
    x,
    x_next,
    old_log_prob,
    advantage,
    k,
    table,
    clip_table,
    weight_table,
    partial,
    d_eps,
    B,
    min_std,
    x0_clip,
    eps_clip,
    X_STRIDE: tl.constexpr,
    NEXT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    SCORED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = tl.arange(0, BLOCK)[None, :]
    inside = row < B
    stored = inside[:, None] & (element < SIZE)
    offset = row[:, None] * SIZE + element
    step = tl.load(k + row, mask=inside, other=0)
    cx, ce, m0, mx, std, sa, s = load_coefficients(
        table, table + 1, table + 2, table + 3, table + 4, table + 5, table + 6, step[:, None], 0, 7, 7, 0
    )
    log_prob, by_eps, _, _, _ = score_transition(
        tl.load(eps + offset, mask=stored, other=0.0).to(tl.float32),
        tl.load(x + row[:, None] * X_STRIDE + element, mask=stored, other=0.0),
        tl.load(x_next + row[:, None] * NEXT_STRIDE + element, mask=stored, other=0.0),
        cx,
        ce,
        m0,
        mx,
        std,
        sa,
        s,
        element,
        min_std,
        x0_clip,
        eps_clip,
        SCORED,
    )
    gradient = _clipped_objective(
        log_prob,
        tl.load(old_log_prob + row, mask=inside, other=0.0),
        tl.load(advantage + row, mask=inside, other=0.0) * tl.load(weight_table + step),
        tl.load(clip_table + step),
        inside,
        partial,
        B,
    )
    if d_eps is not None:
        tl.store(d_eps + offset, gradient[:, None] * by_eps, mask=stored)


@jit
def _value_loss_kernel(  # type: ignore[no-untyped-def]
    value, returns, old_value, partial, d_value, B, clip, SAMPLES: tl.constexpr
):
    row = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    inside = row < B
    v = tl.load(value + row, mask=inside, other=0.0)
    r = tl.load(returns + row, mask=inside, other=0.0)
    error = v - r
    square, gradient = error * error, error
    if clip is not None:
        old = tl.load(old_value + row, mask=inside, other=0.0)
        change = v - old
        held = old + tl.clamp(change, -clip, clip, propagate_nan=tl.PropagateNan.ALL) - r
        held_gradient = tl.where(tl.abs(change) <= clip, held, 0.0)
        share = tl.where(square > held * held, 1.0, tl.where(square == held * held, 0.5, 0.0))
        gradient = share * error + (1.0 - share) * held_gradient
        square = tl.maximum(square, held * held, propagate_nan=tl.PropagateNan.ALL)
    tl.store(partial + tl.program_id(0), tl.sum(0.5 * square))
    if d_value is not None:
        tl.store(d_value + row, gradient / B, mask=inside)


def _gradient_of(tensor: Tensor) -> Tensor | None:
    """Where a kernel puts the gradient with respect to ``tensor``, if anyone wants it."""
    wanted = torch.is_grad_enabled() and tensor.requires_grad
    return torch.empty(tensor.shape, device=tensor.device) if wanted else None


def _policy_loss(partial: Tensor, batch: int, source: Tensor, gradient: Tensor | None) -> PolicyLoss:
    loss, kl, clipped, ratio = (partial[:, :4].sum(0) / batch).unbind()
    loss = with_gradients(loss, [] if gradient is None else [(source, gradient)])
    return PolicyLoss(loss, kl, clipped, ratio, partial[:, 4].max())


def _ppo_loss_triton(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: Tensor) -> PolicyLoss:
    B = len(log_prob)
    programs = -(-B // SAMPLES)
    partial = torch.empty(programs, 5, device=log_prob.device)
    gradient = _gradient_of(log_prob)
    clip = clip.expand(B)
    _ppo_loss_kernel[(programs,)](
        log_prob.contiguous(),
        old_log_prob.contiguous(),
        advantage.contiguous(),
        clip,
        partial,
        gradient,
        B,
        CLIP_STRIDE=clip.stride(0),
        SAMPLES=SAMPLES,
    )
    return _policy_loss(partial, B, log_prob, gradient)


def _chain_ppo_loss_triton(
    eps: Tensor,
    x: Tensor,
    x_next: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    k: Tensor,
    table: Tensor,
    clip_table: Tensor,
    weight_table: Tensor,
    min_std: float,
    reward_horizon: int,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
) -> PolicyLoss:
    B, Th, Da = x.shape
    x, x_next = as_rows(x), as_rows(x_next)
    tile = row_tile(Th * Da)
    programs = -(-B // tile.ROWS)
    partial = torch.empty(programs, 5, device=x.device)
    gradient = _gradient_of(eps)
    _chain_ppo_loss_kernel[(programs,)](
        eps.contiguous(),
        x,
        x_next,
        old_log_prob.contiguous(),
        advantage.contiguous(),
        k.contiguous(),
        table.contiguous(),
        clip_table.contiguous(),
        weight_table.contiguous(),
        partial,
        gradient,
        B,
        float(min_std),
        x0_clip,
        eps_clip,
        X_STRIDE=x.stride(0),
        NEXT_STRIDE=x_next.stride(0),
        SIZE=Th * Da,
        SCORED=min(reward_horizon, Th) * Da,
        **tile._asdict(),
    )
    return _policy_loss(partial, B, eps, gradient)


def _value_loss_triton(value: Tensor, returns: Tensor, old_value: Tensor, clip: float | None = None) -> Tensor:
    B = len(value)
    programs = -(-B // SAMPLES)
    partial = torch.empty(programs, device=value.device)
    gradient = _gradient_of(value)
    _value_loss_kernel[(programs,)](
        value.contiguous(),
        returns.contiguous(),
        old_value.contiguous(),
        partial,
        gradient,
        B,
        clip,
        SAMPLES=SAMPLES,
    )
    return with_gradients(partial.sum() / B, [] if gradient is None else [(value, gradient)])


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: Tensor, backend: Backend | None = None
) -> PolicyLoss:
    """The objective of log-probs [B] and its health, as means over the batch; ``clip`` is 0-d or [B].

    With Triton all is float32 and one pass, of which only ``log_prob`` gets a gradient.

    Raises TypeError for another dtype, ValueError for another shape or device, and what ``resolve`` raises.
    """
    chosen = resolve("ppo_loss", log_prob.device, ("reference", "triton"), backend)
    samples = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantage": advantage}
    _check_samples("ppo_loss", samples | ({"clip": clip} if clip.ndim else {}), chosen)
    run = _ppo_loss_triton if chosen == "triton" else ppo_loss_reference
    return run(log_prob, old_log_prob, advantage, clip)


def chain_ppo_loss(
    eps: Tensor,
    x: Tensor,
    x_next: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    k: Tensor,
    table: Tensor,
    clip_table: Tensor,
    weight_table: Tensor,
    min_std: float,
    reward_horizon: int,
    x0_clip: float | None = None,
    eps_clip: float | None = None,
    backend: Backend | None = None,
) -> PolicyLoss:
    """The objective of transitions x -> x_next at the fine-tuned steps ``k`` [B], given the network's ``eps`` at x.

    Args:
        eps: [B, Th, Da], as x and x_next; may be bfloat16 or float16. With Triton all else is float32, and only eps
            gets a gradient.
        advantage: [B], normalised, not yet multiplied by its step's weight.
        k: [B] int64 in [0, F), which is not checked.
        table: [F, 7], the fine-tuned steps' rows of a noise schedule, with the columns of `Coefficients`.
        clip_table: [F] clip ranges. weight_table: [F] weights of the advantage.

    Raises TypeError for another dtype, ValueError for another shape or device, and what ``resolve`` raises.
    """
    op, F = "chain_ppo_loss", len(table)
    chosen = resolve(op, x.device, ("reference", "triton"), backend)
    check_transitions(op, eps, x, x_next, chosen)
    check_tensor(op, "k", k, (len(x),), (torch.int64,), x.device)
    check_tensor(op, "table", table, (F, 7), (x.dtype,), x.device)
    for name, row in {"clip_table": clip_table, "weight_table": weight_table}.items():
        check_tensor(op, name, row, (F,), (x.dtype,), x.device)
    for name, row in {"old_log_prob": old_log_prob, "advantage": advantage}.items():
        check_tensor(op, name, row, (len(x),), (x.dtype,), x.device)
    run = _chain_ppo_loss_triton if chosen == "triton" else chain_ppo_loss_reference
    return run(
        eps,
        x,
        x_next,
        old_log_prob,
        advantage,
        k,
        table,
        clip_table,
        weight_table,
        min_std,
        reward_horizon,
        x0_clip,
        eps_clip,
    )


def value_loss(
    value: Tensor, returns: Tensor, old_value: Tensor, clip: float | None = None, backend: Backend | None = None
) -> Tensor:
    """The squared error of values [B], 0-d; with ``clip`` at least that of the value's bounded change.

    With Triton all is float32 and one pass, of which only ``value`` gets a gradient.

    Raises TypeError for another dtype, ValueError for another shape or device, and what ``resolve`` raises.
    """
    chosen = resolve("value_loss", value.device, ("reference", "triton"), backend)
    _check_samples("value_loss", {"value": value, "returns": returns, "old_value": old_value}, chosen)
    run = _value_loss_triton if chosen == "triton" else value_loss_reference
    return run(value, returns, old_value, clip)


def _check_samples(op: str, samples: dict[str, Tensor], backend: Backend) -> None:
    first = next(iter(samples.values()))
    real = (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)
    for name, tensor in samples.items():
        check_tensor(op, name, tensor, (len(first),), real, first.device)
