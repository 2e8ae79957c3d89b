"""The conditional 1-D U-Net: against the reference's, and what it promises beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_fast.networks.unet1d import Unet1D
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.types import Obs, UserError
from tests.golden_files import Case, golden_cases
from tests.golden_models import build, check_gradients, is_unet, observations, unet_options
from tests.networks.test_golden_networks import backward, formula_weights, real_size, real_size_cases
from tests.small import seeded
from tests.tolerances import GRADIENT, Tolerance

OUT = Tolerance(relative=3e-6, absolute=1e-6)
"""On another CPU the reference itself is 1e-6 away from what was recorded."""

B, TH, DA, DO = 3, 8, 2, 5


def small(kind: type[Unet1D] = Unet1D, **arguments: Any) -> Unet1D:
    torch.manual_seed(0)
    return kind(DA, TH, DO, **{"diffusion_step_embed_dim": 8, "dim": 8, "dim_mults": (1, 2), **arguments})


def inputs() -> tuple[Tensor, Tensor, Obs]:
    x, state = (torch.randn(B, *shape, generator=seeded(0)) for shape in ((TH, DA), (1, DO)))
    return x, torch.arange(B), {"state": state}


@pytest.mark.parametrize("case", golden_cases("02_unet1d", lambda case: case.cls == "Unet1D"))
def test_as_in_the_reference(case: Case) -> None:
    network = build(case.cfg, horizon_steps=case["in/x"].shape[1])
    network.load_state_dict(case.tensors("w/"))
    x = case.tensor("in/x").requires_grad_()
    out = network(x, case.tensor("in/t"), observations(case))
    OUT.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(case.tensors("grad/"), network)
    GRADIENT.check(x.grad, case["gin"], "x")


@pytest.mark.parametrize("case", real_size_cases(is_unet))
def test_real_size(case: Case) -> None:
    shapes = real_size(case)
    network = Unet1D(**unet_options(shapes, case["in/x"].shape[1], n_groups=8))
    network.load_state_dict(formula_weights(shapes))
    with torch.no_grad():
        out = network(case.tensor("in/x"), case.tensor("in/t"), observations(case))
    OUT.check(out, case["out"])
    assert sum(p.numel() for p in network.parameters()) == case["n_params"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"dim_mults": (1,)},
        {"dim_mults": (2, 4, 4)},
        {"cond_predict_scale": True, "smaller_encoder": True},
        {"cond_mlp_dims": [12, 12, 12, 6], "n_groups": 4, "activation_type": "GELU"},
    ],
    ids=str,
)
def test_every_parameter_takes_part(arguments: dict[str, Any]) -> None:
    network = small(**arguments)
    x, t, obs = inputs()
    out = network(x, t, obs)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def output_and_gradients(network: Unet1D) -> list[Tensor]:
    x, t, obs = inputs()
    out = network(x.requires_grad_(), t, obs)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), [x, *network.parameters()])]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"n_groups": 4, "cond_predict_scale": True}, {"n_groups": 2, "smaller_encoder": True, "kernel_size": 3}],
    ids=str,
)
def test_blocks_are_one_op_on_every_backend(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    network = small(**arguments)
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")
    expected = output_and_gradients(network)
    monkeypatch.setenv("DPPO_FAST_BACKEND", "triton")
    monkeypatch.setattr(torch, "group_norm", None)
    for ours, plain in zip(output_and_gradients(network), expected, strict=True):
        scale = plain.abs().max()
        torch.testing.assert_close(ours / scale, plain / scale, rtol=0, atol=1e-5)


class Seeing(Unet1D):
    """Sees a number besides the state."""

    evaluations = 0

    def features(self, obs: Obs) -> Tensor:
        self.evaluations += 1
        return torch.cat((obs["number"], super().features(obs)), dim=-1)


@pytest.mark.parametrize("cond_mlp_dims", [None, (6, 4)])
def test_a_subclass_adds_features(cond_mlp_dims: tuple[int, ...] | None) -> None:
    network = small(Seeing, visual_dim=1, cond_mlp_dims=cond_mlp_dims)
    x, t, obs = inputs()
    number = torch.rand(B, 1, generator=seeded(1)).requires_grad_()
    network(x, t, {**obs, "number": number})[0].sum().backward()
    assert number.grad is not None
    assert number.grad.squeeze(1).ne(0).tolist() == [True, False, False]


def test_the_observation_is_encoded_once_per_chain() -> None:
    network = small(Seeing, visual_dim=1)
    policy = DiffusionPolicy(network, DiffusionConfig(denoising_steps=4, ft_denoising_steps=3), TH, DA)
    policy.act({**inputs()[2], "number": torch.ones(B, 1)})
    assert (policy.actor.evaluations, policy.actor_ft.evaluations) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim_mults": (1, 2, 4, 8, 16)}, r"horizon_steps=8 must be divisible by 16, as dim_mults=\[1, 2, 4, 8, 16\]"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"n_groups": 16}, r"n_groups=16 must divide all channels, which are dim \* dim_mults=\[8, 16\]"),
        ({"activation_type": "Swish"}, "activation='Swish' is unknown"),
        ({"cond_mlp_dims": (6, 6, 6)}, r"cond_mlp_dims=\[6, 6, 6\] must have an even number of entries"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**arguments)
