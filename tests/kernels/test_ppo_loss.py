"""Against the formulas of the paper, written out in float64 or with more digits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.chain_log_prob import chain_log_prob
from dppo_fast.kernels.denoise_step import Coefficients
from dppo_fast.kernels.ppo_loss import chain_ppo_loss, exp_minus_one_minus, ppo_loss, value_loss

seeds = st.integers(0, 2**32)
sizes = st.integers(1, 40)
CLIP = torch.tensor(0.2, dtype=torch.float64)
BACKENDS = ["reference", "triton"]


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
    expected = [sum(values) / size for values in (losses, divergences, clipped, ratios)] + [max(ratios)]
    assert [float(value) for value in result] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_the_clip_does_not_hold_back_has_a_gradient(backend: Any) -> None:
    """d loss / d log_prob = -A r / B, or 0 where the ratio has gone past the clip in the advantage's direction."""
    log_ratio = torch.tensor([0.1, -0.1, 0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    result = ppo_loss(log_ratio, torch.zeros_like(log_ratio), advantage, CLIP.float(), backend=backend)
    result.loss.backward()
    free = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
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


@pytest.mark.parametrize("x", [-0.0499, -0.01, 0.01, 0.0499])
def test_the_series_has_all_its_terms(x: float) -> None:
    """What is left out is x^4 / 360 of it."""
    exact = sum(x**n / math.factorial(n) for n in range(2, 12))
    assert float(exp_minus_one_minus(torch.tensor(x, dtype=torch.float64))) == pytest.approx(exact, rel=2.5e-8)


def test_a_ratio_at_the_clip_is_not_counted_as_clipped() -> None:
    same = torch.zeros(3)
    assert ppo_loss(same, same, torch.ones(3), torch.zeros(3), backend="reference").clip_fraction == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_divergences_are_exact_in_float32(backend: Any) -> None:
    old = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 3 - 1
    new = old + 1e-4 * torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    log_ratio = new.double() - old.double()
    exact = float((torch.expm1(log_ratio) - log_ratio).mean())
    assert exact == pytest.approx(5e-9, rel=0.1)
    loss = ppo_loss(new, old, torch.ones(10_000), CLIP.float(), backend=backend)
    assert float(loss.approx_kl) == pytest.approx(exact, rel=1e-4)


def test_strided_inputs_give_the_same_numbers() -> None:
    rows = randn(0, 3, 8)
    strided = randn(0, 3, 8).t().contiguous().t()
    assert not strided[0].is_contiguous()
    assert ppo_loss(*strided, CLIP) == ppo_loss(*rows, CLIP)
    assert value_loss(*strided, 0.3) == value_loss(*rows, 0.3)


def float32(*values: Tensor) -> list[Tensor]:
    """What these numbers are in float32, as leaves of their own."""
    return [value.float() if value.is_floating_point() else value for value in values]


def assert_same(ours: Any, exact: Any) -> None:
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=1e-5, atol=1e-7)


def with_gradient(loss: Any, source: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """What ``loss`` returns, and 3 d loss / d source."""
    leaf = source.clone().requires_grad_()
    result = loss(leaf, *arguments, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    (gradient,) = torch.autograd.grad(3 * results[0], leaf)
    return [*results, gradient]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 63, 1000])
@pytest.mark.parametrize("per_row", [False, True])
def test_policy_loss_in_float32(backend: Any, size: int, per_row: bool) -> None:
    old, change, advantage, clip = randn(size, 4, size)
    arguments = float32(old + 0.1 * change, old, advantage, 0.01 + 0.1 * clip.abs() if per_row else CLIP / 2)
    exact = with_gradient(ppo_loss, *(value.double() for value in arguments), backend="reference")
    assert_same(with_gradient(ppo_loss, *arguments, backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 63, 1000])
@pytest.mark.parametrize("cut", [None, 0.3])
def test_value_loss_in_float32(backend: Any, size: int, cut: float | None) -> None:
    arguments = float32(*randn(size, 3, size))
    exact = with_gradient(value_loss, *(value.double() for value in arguments), cut, backend="reference")
    assert_same(with_gradient(value_loss, *arguments, cut, backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_loss_shares_a_tie(backend: Any) -> None:
    """Where both errors are equal either may be followed: PyTorch takes half of each gradient."""
    value, old, returns = (torch.tensor([number]) for number in (1.0, 0.0, 0.75))
    ours = with_gradient(value_loss, value, returns, old, 0.5, backend=backend)
    assert [float(x.detach()) for x in ours] == [0.5 * 0.25**2, 3 * 0.5 * 0.25]


def chain(batch: int, Th: int = 4, Da: int = 3) -> dict[str, Any]:
    """Transitions of 10 fine-tuned DDPM steps, old log-probs nearby."""
    schedule = NoiseSchedule(20)
    generator = torch.Generator().manual_seed(batch)
    eps, x, x_next = torch.randn(3, batch, Th, Da, generator=generator)
    k = torch.randint(10, (batch,), generator=generator)
    options = {"min_std": 0.3, "reward_horizon": 3, "x0_clip": 1.0}
    c = schedule.coefficients(10 + k)
    old = chain_log_prob(eps, x, 0.3 * x_next, c, **options, backend="reference")
    return {
        "eps": eps + 0.1 * torch.randn(eps.shape, generator=generator),
        "x": x,
        "x_next": 0.3 * x_next,
        "old_log_prob": old,
        "advantage": torch.randn(batch, generator=generator),
        "k": k,
        "table": schedule.table[10:],
        "clip_table": torch.linspace(0.001, 0.1, 10),
        "weight_table": torch.linspace(0.5, 1, 10),
        **options,
    }


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and name != "k" else value
        for name, value in arguments.items()
    }


def check_chain(arguments: dict[str, Any], backend: Any) -> None:
    eps, rest = arguments["eps"], {name: value for name, value in arguments.items() if name != "eps"}
    exact = with_gradient(chain_ppo_loss, eps.double(), **double(rest), backend="reference")
    ours = with_gradient(chain_ppo_loss, eps, **rest, backend=backend)
    for actual, expected in zip(ours, exact, strict=True):
        # a mean of terms of either sign may be near 0, and its error is theirs
        scale = float(expected.detach().abs().max()) + (1e-7 if expected.ndim else 1e-2)
        torch.testing.assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=2e-4)


def test_chain_loss_is_the_composition() -> None:
    a = double(chain(30))
    k, table = a["k"], a["table"]
    c = Coefficients(*(column[k][:, None, None] for column in table.unbind(-1)))
    log_prob = chain_log_prob(a["eps"], a["x"], a["x_next"], c, 0.3, 3, 1.0, backend="reference")
    advantage = a["advantage"] * a["weight_table"][k]
    expected = ppo_loss(log_prob, a["old_log_prob"], advantage, a["clip_table"][k], backend="reference")
    assert chain_ppo_loss(**a, backend="reference") == expected
    assert 0 < expected.clip_fraction < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 63, 1000])
def test_chain_loss_in_float32(backend: Any, batch: int) -> None:
    check_chain(chain(batch), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8)
@given(
    batch=st.integers(1, 70),
    Th=st.integers(1, 5),
    Da=st.integers(1, 7),
    x0_clip=st.none() | st.just(0.5),
    eps_clip=st.none() | st.just(0.5),
)
def test_chain_loss_of_any_shape(backend: Any, batch: int, Th: int, Da: int, **clips: float | None) -> None:
    check_chain(chain(batch, Th, Da) | clips, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chain_loss_of_strided_inputs(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with nothing but NaN in new memory."""
    a = chain(40)
    eps = a.pop("eps")
    expected = with_gradient(chain_ppo_loss, eps, **a, backend=backend)
    points = torch.stack([a["x"], a["x_next"]], 1)
    views = {"x": points[:, 0], "x_next": points.mT.contiguous().mT[:, 1]}
    views |= {name: a[name].repeat_interleave(2)[::2] for name in ("k", "old_log_prob", "advantage", "clip_table")}
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    actual = with_gradient(chain_ppo_loss, eps.mT.contiguous().mT, **a | views, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_triton_sums_in_the_same_order_every_time() -> None:
    a = chain(1000)
    first, second = (chain_ppo_loss(**a, backend="triton") for _ in range(2))
    assert first == second
    assert not first.loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_in_the_losses(backend: Any) -> None:
    a = chain(40)
    a["eps"][7, 0, 0] = torch.nan
    assert chain_ppo_loss(**a, backend=backend).loss.isnan()
    value = torch.tensor([0.0, torch.nan])
    assert value_loss(value, torch.zeros(2), torch.zeros(2), 0.1, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(5)}, TypeError, "k is torch.float32, expected torch.int64"),
        ({"table": torch.zeros(10, 5)}, ValueError, r"table has shape \(10, 5\), expected \(10, 7\)"),
        ({"clip_table": torch.zeros(9)}, ValueError, r"clip_table has shape \(9,\), expected \(10,\)"),
        ({"advantage": torch.zeros(5, 1)}, ValueError, r"advantage has shape \(5, 1\), expected \(5,\)"),
        ({"eps": torch.zeros(5, 4, 3).long()}, TypeError, "eps is torch.int64"),
    ],
)
def test_wrong_arguments_of_the_chain_loss_are_named(
    backend: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        chain_ppo_loss(**chain(5) | change, backend=backend)


def test_wrong_arguments_are_named() -> None:
    one = torch.ones(3)
    with pytest.raises(ValueError, match=r"ppo_loss: advantage has shape \(3, 1\), expected \(3,\)"):
        ppo_loss(one, one, one[:, None], one)
    with pytest.raises(TypeError, match=r"ppo_loss: log_prob is torch.float64, expected torch.float32"):
        ppo_loss(one.double(), one, one, one, backend="triton")
    with pytest.raises(ValueError, match=r"value_loss: returns has shape \(2,\), expected \(3,\)"):
        value_loss(one, one[:2], one)


@pytest.mark.gpu
def test_on_cuda() -> None:
    a = chain(1000)
    cuda = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in a.items()}
    exact = with_gradient(chain_ppo_loss, a.pop("eps").double(), **double(a), backend="reference")
    ours = with_gradient(chain_ppo_loss, cuda.pop("eps"), **cuda)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=1e-3, atol=1e-6)
