"""Against the formulas of the paper, written out in float64 or with more digits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_fast.kernels.ppo_loss import exp_minus_one_minus, ppo_loss, value_loss

seeds = st.integers(0, 2**32)
sizes = st.integers(1, 40)
CLIP = torch.tensor(0.2, dtype=torch.float64)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=seeds, size=sizes, per_row=st.booleans())
def test_policy_loss_row_by_row(seed: int, size: int, per_row: bool) -> None:
    new, old, advantage, clip = randn(seed, 4, size)
    clip = clip.abs() if per_row else CLIP
    result = ppo_loss(new, old, advantage, clip)
    losses, divergences, clipped, ratios = [], [], [], []
    for lp, lp_old, a, c in zip(*(x.tolist() for x in (new, old, advantage, clip.expand(size))), strict=True):
        ratio = math.exp(lp - lp_old)
        losses.append(-min(ratio * a, min(max(ratio, 1 - c), 1 + c) * a))
        divergences.append(ratio - 1 - (lp - lp_old))
        clipped.append(abs(ratio - 1) > c)
        ratios.append(ratio)
    expected = [sum(values) / size for values in (losses, divergences, clipped, ratios)]
    assert [float(value) for value in result] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_only_what_the_clip_does_not_hold_back_has_a_gradient() -> None:
    """d loss / d log_prob = -A r / B, or 0 where the ratio has gone past the clip in the advantage's direction."""
    log_ratio = torch.tensor([0.1, -0.1, 0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    result = ppo_loss(log_ratio, torch.zeros_like(log_ratio), advantage, CLIP)
    result.loss.backward()
    free = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(log_ratio.grad, -advantage * log_ratio.detach().exp() * free / 6)
    assert not any(value.requires_grad for value in result[1:])


@pytest.mark.parametrize("cut", [None, 0.3])
def test_gradients(cut: float | None) -> None:
    a, b, c = randn(0, 3, 50)
    assert torch.autograd.gradcheck(lambda new: ppo_loss(new, b, c, CLIP).loss, a.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda value: value_loss(value, b, c, cut), a.clone().requires_grad_())


@given(seed=seeds, size=sizes)
def test_value_loss_row_by_row(seed: int, size: int) -> None:
    value, returns, old = randn(seed, 3, size)
    plain, clipped = [], []
    for v, r, v_old in zip(*(x.tolist() for x in (value, returns, old)), strict=True):
        near = v_old + min(max(v - v_old, -0.3), 0.3)
        plain.append(0.5 * (v - r) ** 2)
        clipped.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert float(value_loss(value, returns, old)) == pytest.approx(sum(plain) / size)
    assert float(value_loss(value, returns, old, 0.3)) == pytest.approx(sum(clipped) / size)


@given(st.floats(-8, 8, width=32))
def test_exp_minus_one_minus_has_no_cancellation(x: float) -> None:
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(x).exp() - 1 - Decimal(x)
    assert float(exp_minus_one_minus(torch.tensor(x))) == pytest.approx(float(exact), rel=1e-5, abs=1e-37)


def test_tiny_divergences_are_exact_in_float32() -> None:
    old = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 3 - 1
    new = old + 1e-4 * torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    log_ratio = new.double() - old.double()
    exact = float((torch.expm1(log_ratio) - log_ratio).mean())
    assert exact == pytest.approx(5e-9, rel=0.1)
    assert float(ppo_loss(new, old, torch.ones(10_000), CLIP.float()).approx_kl) == pytest.approx(exact, rel=1e-4)


def test_strided_inputs_give_the_same_numbers() -> None:
    rows = randn(0, 3, 8)
    strided = randn(0, 3, 8).t().contiguous().t()
    assert not strided[0].is_contiguous()
    assert ppo_loss(*strided, CLIP) == ppo_loss(*rows, CLIP)
    assert value_loss(*strided, 0.3) == value_loss(*rows, 0.3)
