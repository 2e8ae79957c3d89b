"""Precision recipes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.policies.base import Policy
from dppo_fast.runtime.precision import RECIPES, matmul_precision, pick_recipe, update_precision
from dppo_fast.types import UserError
from tests.small import algorithm, diffusion_policy, gaussian_policy, perturb, rollout, seeded

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[True, False])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this CPU multiplies bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return bool(request.param)


def test_auto_follows_the_device(bf16: bool) -> None:
    assert pick_recipe("auto", CPU) == RECIPES["bf16_backward" if bf16 else "fp32"]
    assert pick_recipe("auto", CUDA) == RECIPES["tf32"]


@pytest.mark.parametrize("name", ["tf32", "mixed"])
def test_a_cpu_has_no_tf32(name: str, bf16: bool) -> None:
    assert pick_recipe(name, CUDA) == RECIPES[name]
    with pytest.raises(UserError, match=rf"precision={name} needs a CUDA device, and this run is on cpu"):
        pick_recipe(name, CPU)


def test_rounded_gradients_need_a_cpu_that_multiplies_them(bf16: bool) -> None:
    for device in (CPU, CUDA):
        if bf16 and device == CPU:
            assert pick_recipe("bf16_backward", device) == RECIPES["bf16_backward"]
            continue
        with pytest.raises(UserError, match=f"bf16_backward needs a CPU with AVX512_BF16, which {device} is not"):
            pick_recipe("bf16_backward", device)


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="precision=fp8 is unknown; choose auto, fp32, bf16_backward, tf32, mixed"):
        pick_recipe("fp8", CUDA)


def test_the_flag_is_put_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with matmul_precision("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        with matmul_precision("fp32"):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_sampling_and_updating_share_a_precision_in_every_recipe() -> None:
    assert {recipe.trained for recipe in RECIPES.values()} <= {"fp32", "tf32"}


@pytest.mark.parametrize("shape", [(63,), (1000, 48), (5, 7, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_rounded_gradients_are_products_of_bfloat16(shape: tuple[int, ...], bias: bool) -> None:
    """The layer says the same bits; its gradients are off by three roundings to 8 bits, and not more."""
    generator = seeded(0)
    layer = nn.Linear(shape[-1], 80, bias)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    gradient = torch.randn(*shape[:-1], 80, generator=generator)
    inputs = [x, *layer.parameters()]
    exact = layer(x)
    expected = torch.autograd.grad(exact, inputs, gradient)
    with update_precision(RECIPES["bf16_backward"]):
        rounded = layer(x)
        actual = torch.autograd.grad(rounded, inputs, gradient)
    assert rounded.equal(exact)
    rows, columns = x.detach().abs().view(-1, shape[-1]), gradient.abs().view(-1, 80)
    scales = [(columns @ layer.weight.detach().abs()).view(shape), columns.t() @ rows]
    for one, other, scale in zip(actual, expected, scales, strict=False):
        error = (one - other).abs()
        assert (error <= 3.02 * 2.0**-8 * scale).all()
        assert error.norm() > 1e-3 * other.norm()
    if bias:
        assert actual[2].equal(expected[2])


def test_a_gradient_that_is_differentiated_is_not_rounded() -> None:
    """An exact likelihood holds a gradient of the network, which sampling and update have to agree on."""
    layer, x = nn.Linear(70, 80), torch.randn(5, 70, generator=seeded(0), requires_grad=True)

    def inner() -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        return gradient

    exact = inner()
    (expected,) = torch.autograd.grad(exact.square().sum(), layer.weight)
    with update_precision(RECIPES["bf16_backward"]):
        assert inner().equal(exact)
        (actual,) = torch.autograd.grad(inner().square().sum(), layer.weight)
    assert 0 < float((actual - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize("make", [diffusion_policy, gaussian_policy])
def test_an_update_sees_the_same_losses_and_almost_the_same_gradient(make: Callable[[], Policy]) -> None:
    losses, gradients = [], []
    for recipe in (RECIPES["fp32"], RECIPES["bf16_backward"]):
        policy = make()
        learner = algorithm(policy, rollout(policy, steps=16))
        perturb(policy.trained(), 0.01)  # so that ratios are not 1
        learner.recipe, learner.batch = recipe, learner._prepare()
        row = torch.arange(64)
        losses.append(learner.learn({"row": row, "k": row % policy.decisions, "stop": torch.zeros(())}, ("critic",)))
        parameters = [*policy.trained().parameters(), *learner.critic.parameters()]
        gradients.append([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    assert losses[0].equal(losses[1])
    exact, rounded = (torch.cat(parts) for parts in gradients)
    assert 1e-9 < 1 - float(torch.cosine_similarity(exact.double(), rounded.double(), dim=0)) < 1e-4


@pytest.mark.gpu
def test_each_kind_rounds_as_it_says() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256, device="cuda")
    exact = a.double() @ b.double()

    def error(kind: str) -> float:
        with matmul_precision(kind):  # type: ignore[arg-type]
            return float(((a @ b).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert error("fp32") < 1e-6 < error("tf32") < 1e-3 < error("bf16") < 1e-2
