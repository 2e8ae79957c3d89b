"""Against the textbook's formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from dppo_fast.kernels.denoise_step import (
    Coefficients,
    chunk_log_prob,
    denoise_step,
    gaussian_log_density,
    posterior_mean,
)

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
seeds = st.integers(0, 2**32)
fractions = st.floats(0.05, 0.95)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ddim_row(abar: float, abar_prev: float, eta: float) -> tuple[Coefficients, float]:
    """A step's coefficients and its sigma (Song et al. 2021, eq. 12 and 16)."""
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)) ** 0.5
    sa, s = abar**0.5, (1 - abar) ** 0.5
    direction = (1 - abar_prev - sigma**2) ** 0.5
    numbers = (1 / sa, -s / sa, abar_prev**0.5 - direction * sa / s, direction / s, sigma, sa, s)
    return Coefficients(*torch.tensor(numbers, dtype=torch.float64)), sigma


def example(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of a step."""
    row, _ = ddim_row(0.3, 0.6, 0.7)
    row = Coefficients(*(value.to(dtype) for value in row))
    tensors = {name: randn(seed, 5, 4, 3, dtype=dtype) for seed, name in enumerate(("eps", "x", "noise"))}
    return tensors | {"c": row, "std": row.std}


@given(shape=shapes, seed=seeds, abar=fractions, ratio=fractions, eta=st.floats(0, 1), eps_clip=st.none() | fractions)
def test_is_the_ddim_step(
    shape: tuple[int, ...], seed: int, abar: float, ratio: float, eta: float, eps_clip: float | None
) -> None:
    abar_prev = abar + (1 - abar) * ratio
    row, sigma = ddim_row(abar, abar_prev, eta)
    eps, x, noise = randn(seed, 3, *shape)
    x_next, mean = denoise_step(eps, x, noise, row, row.std, x0_clip=1.0, eps_clip=eps_clip)

    x0 = ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).clamp(-1, 1)
    eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
    if eps_clip is not None:
        eps = eps.clamp(-eps_clip, eps_clip)
    expected = abar_prev**0.5 * x0 + (1 - abar_prev - sigma**2) ** 0.5 * eps
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_next, expected + sigma * noise, rtol=1e-9, atol=1e-9)


@given(seed=seeds, abar=fractions, ratio=fractions)
def test_full_noise_gives_the_posterior_of_the_forward_process(seed: int, abar: float, ratio: float) -> None:
    """p(x' | x, x0) is proportional to N(x'; sqrt(abar') x0, 1 - abar') N(x; sqrt(alpha) x', 1 - alpha)."""
    abar_prev = abar + (1 - abar) * ratio
    row, sigma = ddim_row(abar, abar_prev, eta=1.0)
    x0, x = randn(seed, 2, 2, 3, 2)
    eps = (x - row.sa * x0) / row.s
    alpha = abar / abar_prev
    precision = 1 / (1 - abar_prev) + alpha / (1 - alpha)
    mean = (abar_prev**0.5 * x0 / (1 - abar_prev) + alpha**0.5 * x / (1 - alpha)) / precision
    torch.testing.assert_close(posterior_mean(eps, x, row), mean, rtol=1e-9, atol=1e-9)
    assert sigma**2 == pytest.approx(1 / precision)


def test_bounds_on_the_predictions_and_on_the_result() -> None:
    arguments = example()
    eps, x, row = arguments["eps"], arguments["x"], arguments["c"]
    huge = posterior_mean(1e9 * eps, x, row, x0_clip=1.0)
    torch.testing.assert_close(huge, row.m0 * -eps.sign() + row.mx * x)
    x_next, mean = denoise_step(**arguments, out_clip=0.1)
    free, same_mean = denoise_step(**arguments)
    assert x_next.equal(free.clamp(-0.1, 0.1))
    assert not x_next.equal(free)
    assert mean.equal(same_mean)


@given(shape=shapes, seed=seeds)
def test_log_density_is_the_normal_one(shape: tuple[int, ...], seed: int) -> None:
    x, mean, log_std = randn(seed, 3, *shape)
    std = log_std.exp()
    torch.testing.assert_close(gaussian_log_density(x, mean, std), Normal(mean, std).log_prob(x))


@given(shape=shapes, seed=seeds, horizon=st.integers(1, 5))
def test_log_prob_of_a_chunk_clamps_cuts_and_averages(shape: tuple[int, ...], seed: int, horizon: int) -> None:
    density = 5 * randn(seed, *shape)
    rows = []
    for chunk in density.tolist():
        kept = [min(max(value, -5), 2) for step in chunk[:horizon] for value in step]
        rows.append(sum(kept) / len(kept))
    torch.testing.assert_close(chunk_log_prob(density, horizon), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("clips", [{}, {"x0_clip": 0.7}, {"x0_clip": 0.7, "eps_clip": 0.5, "out_clip": 0.9}])
def test_gradients_of_the_step(clips: dict[str, float]) -> None:
    arguments = example()

    def step(eps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return denoise_step(**(arguments | {"eps": eps, "x": x}), **clips)

    assert torch.autograd.gradcheck(step, (arguments["eps"].requires_grad_(), arguments["x"].requires_grad_()))


def test_gradients_of_the_log_prob() -> None:
    x, mean, log_std = randn(0, 3, 4, 3, 2)
    leaves = mean.requires_grad_(), (2 * log_std).requires_grad_()

    def log_prob(mean: Tensor, log_std: Tensor) -> Tensor:
        return chunk_log_prob(gaussian_log_density(x, mean, log_std.exp()), reward_horizon=2)

    density = gaussian_log_density(x, mean, leaves[1].exp())
    assert {bool(b) for b in ((density < -5) | (density > 2)).flatten()} == {True, False}
    assert torch.autograd.gradcheck(log_prob, leaves)


def test_float32_is_as_exact_as_it_can_be() -> None:
    double, single = example(), example(torch.float32)
    double |= {name: single[name].double() for name in ("eps", "x", "noise")}
    clips = {"x0_clip": 1.0, "eps_clip": 2.0}
    for ours, exact in zip(denoise_step(**single, **clips), denoise_step(**double, **clips), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)
    log_density = gaussian_log_density(single["x"], single["eps"], single["std"])
    exact = gaussian_log_density(double["x"], double["eps"], double["std"])
    torch.testing.assert_close(log_density.double(), exact, rtol=2e-6, atol=2e-6)


def test_strided_inputs_give_the_same_numbers() -> None:
    arguments = example(torch.float32)
    strided = {name: arguments[name].permute(2, 0, 1).contiguous().permute(1, 2, 0) for name in ("eps", "x", "noise")}
    assert not strided["x"].is_contiguous()
    clips = {"x0_clip": 0.7, "eps_clip": 0.5}
    for ours, expected in zip(
        denoise_step(**(arguments | strided), **clips), denoise_step(**arguments, **clips), strict=True
    ):
        assert ours.equal(expected)


def test_every_sample_may_have_a_step_of_its_own() -> None:
    arguments = example(torch.float32)
    rows = [ddim_row(abar, 0.9, 1.0)[0] for abar in (0.1, 0.2, 0.3, 0.4, 0.5)]
    columns = [torch.stack(column).float()[:, None, None] for column in zip(*rows, strict=True)]
    together = posterior_mean(arguments["eps"], arguments["x"], Coefficients(*columns), 1.0, 2.0)
    for b, row in enumerate(rows):
        alone = Coefficients(*(value.float() for value in row))
        assert together[b].equal(posterior_mean(arguments["eps"][b], arguments["x"][b], alone, 1.0, 2.0))
