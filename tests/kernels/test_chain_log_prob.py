"""Against the formulas, and against autograd through them in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.chain_log_prob import chain_log_prob
from dppo_fast.kernels.denoise_step import Coefficients, posterior_mean

BACKENDS = ["reference", "triton"]
DDIM = NoiseSchedule(20, ddim_steps=5)
DDPM = NoiseSchedule(20)


def transitions(
    batch: int, Th: int = 4, Da: int = 3, eta: int | None = None, schedule: NoiseSchedule = DDIM
) -> dict[str, Any]:
    """Transitions, at steps of their own, of which some elements are clipped; ``eta``: how many columns it has."""
    generator = torch.Generator().manual_seed(batch)
    eps, x, x_next = torch.randn(3, batch, Th, Da, generator=generator)
    k = torch.randint(schedule.steps, (batch,), generator=generator)
    own = None if eta is None else torch.rand(batch, eta, generator=generator) + 0.1
    c = schedule.coefficients(k, eta=own)
    return {"eps": eps, "x": x, "x_next": 0.5 * x_next, "c": c, "min_std": 0.2, "reward_horizon": 3, "x0_clip": 1.0}


def with_gradients(arguments: dict[str, Any], dtype: Any, backend: Any) -> dict[str, Tensor]:
    """lp and the gradients of its weighted sum with respect to eps and the coefficients of eta."""
    cast = {name: v.to(dtype, copy=True) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    leaves = {name: getattr(arguments["c"], name).to(dtype, copy=True) for name in ("m0", "mx", "std")}
    c = Coefficients(*(value.to(dtype) for value in arguments["c"]))._replace(**leaves)
    leaves["eps"] = cast["eps"]
    for leaf in leaves.values():
        leaf.requires_grad_()
    log_prob = chain_log_prob(**cast | {"c": c}, backend=backend)
    weight = torch.linspace(-1, 2, len(log_prob), dtype=dtype)
    gradients = torch.autograd.grad((weight * log_prob).sum(), list(leaves.values()))
    return {"log_prob": log_prob.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(arguments: dict[str, Any], backend: Any) -> None:
    exact = with_gradients(arguments, torch.float64, "reference")
    for name, ours in with_gradients(arguments, torch.float32, backend).items():
        scale = float(exact[name].abs().max()) + 1e-6
        torch.testing.assert_close(ours.double() / scale, exact[name] / scale, rtol=0, atol=2e-5, msg=name)


def test_is_the_normal_density_of_the_posterior() -> None:
    a = transitions(9)
    mean = posterior_mean(a["eps"], a["x"], a["c"], 1.0)
    density = Normal(mean, a["c"].std.clamp(min=0.2)).log_prob(a["x_next"]).clamp(-5, 2)
    torch.testing.assert_close(chain_log_prob(**a, backend="reference"), density[:, :3].mean((1, 2)))


@pytest.mark.parametrize("eps_clip", [None, 0.7])
def test_reference_passes_gradcheck(eps_clip: float | None) -> None:
    a = transitions(4, eta=3)
    c = Coefficients(*(value.double() for value in a["c"]))
    leaves = [a["eps"].double(), c.m0, c.mx, c.std]

    def log_prob(eps: Tensor, m0: Tensor, mx: Tensor, std: Tensor) -> Tensor:
        eta = c._replace(m0=m0, mx=mx, std=std)
        return chain_log_prob(eps, a["x"].double(), a["x_next"].double(), eta, 0.2, 3, 1.0, eps_clip)

    assert torch.autograd.gradcheck(log_prob, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 63, 1000])
def test_forward_and_gradient_in_float32(backend: Any, batch: int) -> None:
    check(transitions(batch, schedule=DDPM), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(
    batch=st.integers(1, 70),
    Th=st.integers(1, 5),
    Da=st.integers(1, 7),
    eta=st.sampled_from([None, "state", "action"]),
    x0_clip=st.none() | st.floats(0.25, 2.0, width=32),
    eps_clip=st.none() | st.floats(0.25, 2.0, width=32),
    min_std=st.sampled_from([0.05, 0.3]),
    reward_horizon=st.integers(1, 6),
)
def test_any_shape_eta_and_clip(backend: Any, batch: int, Th: int, Da: int, eta: str | None, **options: Any) -> None:
    columns = {None: None, "state": 1, "action": Da}[eta]
    check(transitions(batch, Th, Da, columns) | options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_pass_gradients_at_their_bounds_and_none_beyond(backend: Any) -> None:
    """x0 = eps at, inside and outside of [-1, 1]; the mean is x0 and x' = 0.5 above it."""
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    c = Coefficients(cx=zero, ce=one, m0=one, mx=zero, std=one, sa=zero, s=one)
    eps = torch.tensor([-1.0, 1.0, 0.5, 1.5, -1.5, torch.nan]).view(6, 1, 1).requires_grad_()
    x_next = eps.detach().clamp(-1, 1) + 0.5
    log_prob = chain_log_prob(eps, torch.zeros_like(x_next), x_next, c, 0.0, 1, 1.0, backend=backend)
    log_prob[:5].sum().backward()
    assert eps.grad.flatten().tolist()[:5] == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert log_prob.isnan().tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_where_the_density_is_clipped(backend: Any) -> None:
    a = transitions(50)
    a["x_next"][:, 0] += 100
    a["x_next"][:, 1] = posterior_mean(a["eps"], a["x"], a["c"], 1.0)[:, 1]
    a |= {"min_std": 0.01, "c": a["c"]._replace(std=torch.full_like(a["c"].std, 0.01))}
    gradients = with_gradients(a, torch.float32, backend)
    assert gradients["eps"][:, :2].count_nonzero() == 0
    a["reward_horizon"] = 2
    assert with_gradients(a, torch.float32, backend)["log_prob"].tolist() == [-1.5] * 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_numbers(backend: Any) -> None:
    a = transitions(20)
    chain = torch.stack([a["x"], a["x_next"]], 1)
    views = {"eps": a["eps"].mT.contiguous().mT, "x": chain[:, 0], "x_next": chain.mT.contiguous().mT[:, 1]}
    expected, actual = (with_gradients(arguments, torch.float32, backend) for arguments in (a, a | views))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_all_of_what_it_makes(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = transitions(33, eta=1)
    expected = with_gradients(a, torch.float32, backend)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    actual = with_gradients(a, torch.float32, backend)
    assert all(actual[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_they_are_wanted(backend: Any) -> None:
    a = transitions(5)
    assert not chain_log_prob(**a, backend=backend).requires_grad
    a["eps"].requires_grad_()
    with torch.no_grad():
        assert not chain_log_prob(**a, backend=backend).requires_grad
    half = a["eps"].detach().bfloat16().requires_grad_()
    chain_log_prob(**a | {"eps": half}, backend=backend).sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda x: x.flatten(1), ValueError, r"x has shape \(5, 12\), expected \[B, Th, Da\]"),
        ("x_next", lambda x: x[1:], ValueError, r"x_next has shape \(4, 4, 3\), expected \(5, 4, 3\)"),
        ("eps", Tensor.long, TypeError, "eps is torch.int64, expected torch.float32"),
        ("x_next", lambda x: x.to("meta"), ValueError, "x_next is on meta, expected cpu"),
    ],
)
def test_wrong_arguments_are_named(backend: Any, name: str, change: Any, error: type[Exception], message: str) -> None:
    a = transitions(5)
    a[name] = change(a[name])
    with pytest.raises(error, match=message):
        chain_log_prob(**a, backend=backend)
