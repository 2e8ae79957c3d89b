"""Against PyTorch's modules, and against autograd through the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dppo_fast.kernels.norm_act_film import ACTIVATIONS, LARGEST_GROUP, norm_act_film
from dppo_fast.networks import embed

BACKENDS = ["reference", "triton"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FILMS = {"none": 0, "shift": 1, "scale and shift": 2}
"""FiLM -> numbers a channel."""


def arguments(
    batch: int, groups: int = 2, width: int = 3, L: int = 5, film: str = "scale and shift", norm: bool = True
) -> dict[str, Any]:
    """Groups of ``width`` channels."""
    generator = torch.Generator().manual_seed(batch)
    C = groups * width
    made = {"x": torch.randn(batch, C, L, generator=generator)}
    if norm:
        made |= {name: torch.randn(C, generator=generator) for name in ("weight", "bias")}
    if film != "none":
        made["film"] = torch.randn(batch, FILMS[film] * C, generator=generator)
    return {**{name: value.to(DEVICE) for name, value in made.items()}, "groups": groups}


def with_gradients(a: dict[str, Any], dtype: Any, backend: Any) -> dict[str, Tensor]:
    """y and the gradients of its weighted sum with respect to all tensors."""
    leaves = {name: v.to(dtype, copy=True).requires_grad_() for name, v in a.items() if isinstance(v, Tensor)}
    y = norm_act_film(**a | leaves, backend=backend)
    weight = torch.linspace(-1, 2, y.numel(), dtype=dtype, device=DEVICE).view_as(y)
    gradients = torch.autograd.grad((weight * y).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(a: dict[str, Any], backend: Any) -> None:
    exact = with_gradients(a, torch.float64, "reference")
    for name, ours in with_gradients(a, torch.float32, backend).items():
        assert ours.dtype == torch.float32
        scale = float(exact[name].abs().max()) + 1
        torch.testing.assert_close(ours.double() / scale, exact[name] / scale, rtol=0, atol=5e-6, msg=name)


@pytest.mark.parametrize("activation", embed.ACTIVATIONS)
def test_is_what_the_modules_compute(activation: str) -> None:
    a = arguments(4)
    norm = nn.GroupNorm(2, 6, eps=0.1).to(DEVICE)
    norm.load_state_dict({name: a[name] for name in ("weight", "bias")})
    scale, shift = a["film"].unsqueeze(-1).chunk(2, dim=1)
    h = embed.activation(activation)(norm(a["x"]))
    for film, expected in ((a["film"], scale * h + shift), (shift.squeeze(-1), h + shift), (None, h)):
        y = norm_act_film(**a | {"film": film}, eps=0.1, activation=activation, backend="reference")
        torch.testing.assert_close(y, expected)
    without = norm_act_film(a["x"], activation=activation, backend="reference")
    torch.testing.assert_close(without, embed.activation(activation)(a["x"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 63, 1000])
def test_forward_and_gradients_in_float32(backend: Any, batch: int) -> None:
    check(arguments(batch, width=4, L=8), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "width", "L"), [(8, 8, 16), (8, 32, 4), (8, 16, 2), (1, 63, 32), (3, 5, 3)])
def test_groups_as_in_networks_and_at_the_limits(backend: Any, groups: int, width: int, L: int) -> None:
    check(arguments(3, groups, width, L), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(
    batch=st.integers(1, 40),
    groups=st.integers(1, 4),
    width=st.integers(1, 7),
    L=st.integers(1, 9),
    film=st.sampled_from(sorted(FILMS)),
    norm=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_any_shape_and_activation(
    backend: Any, batch: int, groups: int, width: int, L: int, film: str, norm: bool, activation: str
) -> None:
    """The large eps keeps small groups, of which almost nothing is left, from dividing rounding errors by it."""
    check(arguments(batch, groups, width, L, film, norm) | {"activation": activation, "eps": 0.5}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(backend: Any, activation: str) -> None:
    x = torch.tensor([-80.0, -30, -20, -5, -0.1, -1e-6, 0, 1e-6, 0.1, 5, 20, 30, 80], device=DEVICE)
    a = {"x": x.view(1, 1, -1), "activation": activation}
    exact, ours = with_gradients(a, torch.float64, "reference"), with_gradients(a, torch.float32, backend)
    for name in exact:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-6, atol=5e-7, msg=name)


def test_the_variance_is_taken_around_the_mean() -> None:
    """PyTorch's own float32 is less exact."""
    a = arguments(4, width=4, L=8)
    check(a | {"x": a["x"] + 100}, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_numbers(backend: Any) -> None:
    a = arguments(20)
    leaves = {name: value for name, value in a.items() if isinstance(value, Tensor)}
    wide = torch.cat([a["film"], a["film"]], 1)
    views = {
        "x": a["x"].mT.contiguous().mT,
        "film": wide[:, 12:],
        "weight": a["weight"].repeat_interleave(2)[::2],
        "bias": a["bias"].repeat_interleave(2)[::2],
    }
    assert not any(views[name].is_contiguous() for name in leaves)
    gradient = torch.randn(5, 6, 20, device=DEVICE).permute(2, 1, 0)
    results = []
    for tensors, by_y in ((leaves, gradient.contiguous()), (views, gradient)):
        inputs = [tensors[name].requires_grad_() for name in leaves]
        y = norm_act_film(**a | tensors, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, by_y)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_all_of_what_it_makes(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments(33)
    expected = with_gradients(a, torch.float32, backend)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    actual = with_gradients(a, torch.float32, backend)
    assert all(actual[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("film",), ("bias", "film")], ids=str)
def test_gradients_only_where_they_are_wanted(backend: Any, wanted: tuple[str, ...]) -> None:
    a = arguments(5)
    assert not norm_act_film(**a, backend=backend).requires_grad
    everything = {name: a[name].clone().requires_grad_() for name in ("x", "weight", "bias", "film")}
    norm_act_film(**a | everything, backend=backend).square().sum().backward()
    for name in wanted:
        a[name].requires_grad_()
    norm_act_film(**a, backend=backend).square().sum().backward()
    for name, leaf in everything.items():
        if name in wanted:
            torch.testing.assert_close(a[name].grad, leaf.grad)
        else:
            assert a[name].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_can_be_differentiated(backend: Any) -> None:
    """As an exact likelihood does it."""
    a = arguments(6)

    def second(dtype: Any, backend: Any) -> tuple[Tensor, ...]:
        leaves = {name: v.to(dtype, copy=True).requires_grad_() for name, v in a.items() if isinstance(v, Tensor)}
        y = norm_act_film(**a | leaves, backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(leaves.values()))

    for ours, exact in zip(second(torch.float32, backend), second(torch.float64, "reference"), strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_comes_in_and_float32_goes_out(backend: Any) -> None:
    a = arguments(7)
    half = {name: a[name].bfloat16().requires_grad_() for name in ("x", "film")}
    y = norm_act_film(**a | half, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, norm_act_film(**a | {name: value.float() for name, value in half.items()}))
    y.square().sum().backward()
    assert {value.grad.dtype for value in half.values()} == {torch.bfloat16}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_group(backend: Any) -> None:
    a = arguments(5, width=2)
    a["x"][3, 1, 2] = torch.nan
    assert norm_act_film(**a, backend=backend).isnan().all(2).nonzero().tolist() == [[3, 0], [3, 1]]


def test_larger_groups_are_for_the_reference() -> None:
    x = torch.randn(2, 2, LARGEST_GROUP // 2 + 1, device=DEVICE)
    assert norm_act_film(x).equal(norm_act_film(x, backend="reference"))
    with pytest.raises(ValueError, match="backend='triton': norm_act_film has the backends reference"):
        norm_act_film(x, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(5, 6)}, ValueError, r"x has shape \(5, 6\), expected \[B, C, L\]"),
        ({"groups": 4}, ValueError, r"x has shape \(5, 6, 5\), expected .*, C divisible by groups=4"),
        ({"x": torch.ones(5, 6, 5, dtype=torch.long)}, TypeError, "x is torch.int64, expected torch.float32"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\), expected \(6,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias is torch.float16, expected torch.float32"),
        ({"bias": None}, ValueError, "weight and bias, expected both or neither"),
        ({"film": torch.ones(1, 12)}, ValueError, r"film has shape \(1, 12\), expected \(5, 12\)"),
        ({"film": torch.ones(5, 7)}, ValueError, r"film has shape \(5, 7\), expected \(5, 6\)"),
        ({"film": torch.ones(5, 6, device="meta")}, ValueError, f"film is on meta, expected {DEVICE.type}"),
        ({"activation": "Swish"}, ValueError, "activation='Swish', expected one of Identity, ReLU"),
    ],
)
def test_wrong_arguments_are_named(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    moved = {
        name: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type == "cpu" else v for name, v in change.items()
    }
    with pytest.raises(error, match=message):
        norm_act_film(**arguments(5) | moved, backend=backend)
