"""Against the textbook's formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from dppo_fast.kernels.denoise_step import (
    Bounds,
    Coefficients,
    NoiseKey,
    Score,
    chunk_log_prob,
    denoise_step,
    gaussian_log_density,
    posterior_mean,
    sampling_step,
)
from dppo_fast.kernels.philox import keyed_normal

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


BACKENDS = ["reference", "triton"]
BOUNDS = Bounds(x0=0.8, eps=0.9, randn=1.0, out=0.7)


def sampling_arguments(
    batch: int, Th: int = 4, Da: int = 3, per_sample: bool = False, per_dim: bool = False, dtype: Any = torch.float32
) -> dict[str, Any]:
    """``per_sample``: a step of each sample's own; ``per_dim``: with eta per action dimension, as well."""
    generator = torch.Generator().manual_seed(batch)
    row = [value.to(dtype) for value in ddim_row(0.3, 0.6, 0.7)[0]]
    if per_sample or per_dim:
        own = 1 + 0.1 * torch.randn(7, batch, 1, Da, generator=generator, dtype=dtype)
        row = [value * factor[..., :1] for value, factor in zip(row, own, strict=True)]
        row[2:5] = [value * (factor if per_dim else 1) for value, factor in zip(row[2:5], own[2:5], strict=True)]
    c = Coefficients(*row)
    eps, x, noise = torch.randn(3, batch, Th, Da, generator=generator, dtype=dtype)
    return {"eps": eps, "x": x, "noise": noise, "c": c, "std": c.std * 1.1, "bounds": BOUNDS, "score": Score(0.3, 3)}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    c = Coefficients(*(value.double() for value in arguments["c"]))
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in arguments.items()} | {"c": c}


def check_sampling_step(arguments: dict[str, Any], backend: Any) -> None:
    """Against the reference in float64, where elements at a bound may fall on either side of it."""
    x_next, log_prob = sampling_step(**arguments, backend=backend)
    exact, exact_log_prob = sampling_step(**in_float64(arguments), backend="reference")
    torch.testing.assert_close(x_next.double(), exact, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(log_prob.double(), exact_log_prob, rtol=1e-5, atol=1e-5)


def test_sampling_step_is_the_step_and_the_log_prob_of_its_result() -> None:
    a = sampling_arguments(5, dtype=torch.float64)
    x_next, log_prob = sampling_step(**a, backend="reference")
    z = a["noise"].clamp(-BOUNDS.randn, BOUNDS.randn)
    expected, mean = denoise_step(a["eps"], a["x"], z, a["c"], a["std"], BOUNDS.x0, BOUNDS.eps, BOUNDS.out)
    assert x_next.equal(expected)
    assert (x_next.abs() == BOUNDS.out).any()
    density = Normal(mean, a["c"].std.clamp(min=0.3)).log_prob(x_next).clamp(-5, 2)
    torch.testing.assert_close(log_prob, density[:, :3].mean((1, 2)))
    assert sampling_step(**a | {"score": None}, backend="reference")[1] is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 63, 1000])
def test_sampling_step_in_float32(backend: Any, batch: int) -> None:
    check_sampling_step(sampling_arguments(batch), backend)
    check_sampling_step(sampling_arguments(batch) | {"bounds": Bounds(), "score": Score(0.0, 9)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8)
@given(
    batch=st.integers(1, 70),
    Th=st.integers(1, 5),
    Da=st.integers(1, 7),
    per_sample=st.booleans(),
    per_dim=st.booleans(),
    bounds=st.builds(Bounds, *[st.none() | st.floats(0.25, 2.0, width=32)] * 4),
    score=st.builds(Score, st.floats(0.0, 0.5), st.integers(1, 6)),
)
def test_sampling_step_of_any_shape(backend: Any, bounds: Bounds, score: Score, **shape: Any) -> None:
    check_sampling_step(sampling_arguments(**shape) | {"bounds": bounds, "score": score}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_step_writes_into_the_chain_and_nowhere_else(backend: Any) -> None:
    a = sampling_arguments(40)
    expected, expected_log_prob = sampling_step(**a, backend=backend)
    chain, log_probs = torch.full((40, 3, 4, 3), torch.nan), torch.full((40, 2), torch.nan)
    chain[:, 0] = a["x"]
    strided = {"x": chain[:, 0], "eps": a["eps"].mT.contiguous().mT, "noise": a["noise"].repeat(1, 1, 2)[..., :3]}
    x_next, log_prob = sampling_step(**a | strided, out=chain[:, 1], log_prob_out=log_probs[:, 1], backend=backend)
    assert x_next.data_ptr() == chain[:, 1].data_ptr()
    assert log_prob.data_ptr() == log_probs[:, 1].data_ptr()
    assert x_next.equal(expected)
    assert log_prob.equal(expected_log_prob)
    assert chain[:, 2].isnan().all()
    assert log_probs[:, 0].isnan().all()
    sampling_step(**a, out=a["x"], backend=backend)
    assert a["x"].equal(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_step_writes_all_of_what_it_makes(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = sampling_arguments(33)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(*_shape(shape), torch.nan, **options))
    x_next, log_prob = sampling_step(**a, backend=backend)
    assert not x_next.isnan().any()
    assert not log_prob.isnan().any()


def _shape(arguments: tuple[Any, ...]) -> tuple[Any]:
    return arguments if isinstance(arguments[0], tuple) else (arguments,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_step_draws_what_its_key_says(backend: Any) -> None:
    a = sampling_arguments(40) | {"bounds": Bounds(randn=1.0)}
    env, step = torch.arange(40).flip(0), torch.arange(40) ** 2
    z = keyed_normal(2**33 + 1, env, step, 4, 12, backend="reference")[3].view(40, 4, 3)
    expected = sampling_step(**a | {"noise": z}, backend=backend)
    actual = sampling_step(**a | {"noise": NoiseKey(2**33 + 1, env, step, 3)}, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert not actual[0].equal(sampling_step(**a, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["eps", "noise"])
def test_nan_stays_in_its_row_and_is_not_clipped_away(backend: Any, name: str) -> None:
    a = sampling_arguments(20)
    a[name][3, 0, 1] = torch.nan
    x_next, log_prob = sampling_step(**a, backend=backend)
    assert x_next.isnan().nonzero().tolist() == [[3, 0, 1]]
    assert log_prob.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_step_takes_a_half_precision_eps(backend: Any) -> None:
    a = sampling_arguments(20)
    expected = sampling_step(**a | {"eps": a["eps"].bfloat16().float()}, backend=backend)
    actual = sampling_step(**a | {"eps": a["eps"].bfloat16()}, backend=backend)
    assert all(x.equal(y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 12)}, ValueError, r"x has shape \(5, 12\), expected \[B, Th, Da\]"),
        ({"eps": torch.zeros(5, 3, 4)}, ValueError, r"eps has shape \(5, 3, 4\), expected \(5, 4, 3\)"),
        ({"noise": torch.zeros(5, 4, 3).double()}, TypeError, "noise is torch.float64, expected torch.float32"),
        ({"out": torch.zeros(5, 4, 3).to("meta")}, ValueError, "out is on meta, expected cpu"),
        ({"log_prob_out": torch.zeros(5, 1)}, ValueError, r"log_prob_out has shape \(5, 1\), expected \(5,\)"),
        (
            {"noise": NoiseKey(0, torch.zeros(5), torch.zeros(5).long(), 0)},
            TypeError,
            "env is torch.float32, expected torch.int64",
        ),
    ],
)
def test_wrong_arguments_of_the_sampling_step_are_named(
    backend: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sampling_step(**sampling_arguments(5) | change, backend=backend)


def test_triton_refuses_what_it_cannot_write() -> None:
    a = sampling_arguments(5)
    with pytest.raises(ValueError, match=r"out has strides \(12, 1, 4\), expected \(any, 3, 1\)"):
        sampling_step(**a, out=torch.zeros(5, 3, 4).mT, backend="triton")
    with pytest.raises(TypeError, match=r"eps is torch\.float64"):
        sampling_step(**in_float64(a), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("per_dim", [False, True])
def test_sampling_step_on_cuda(per_dim: bool) -> None:
    a = sampling_arguments(1000, per_dim=per_dim)
    expected = sampling_step(**in_float64(a), backend="reference")
    c = Coefficients(*(value.cuda() for value in a["c"]))
    cuda = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in a.items()} | {"c": c}
    for ours, exact in zip(sampling_step(**cuda), expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-5)
