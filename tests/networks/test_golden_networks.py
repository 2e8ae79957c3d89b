"""Networks against the reference's outputs and gradients, and at their real sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.networks.embed import SinusoidalPosEmb
from dppo_fast.networks.mlp import DiffusionMLP
from tests.golden_files import Case, golden_cases
from tests.golden_models import (
    Shapes,
    build,
    check_gradients,
    critic_mlp,
    diffusion_mlp_options,
    is_diffusion_mlp,
    observations,
    roots,
)
from tests.tolerances import FORWARD, GRADIENT, Tolerance


def load(case: Case) -> nn.Module:
    module = build(case.cfg)
    module.load_state_dict(case.tensors("w/"))
    return module


def backward(case: Case, **outputs: Tensor) -> None:
    """Of the sum of the outputs times the cotangents that the case has for them."""
    sum((out * case.tensor(name)).sum() for name, out in outputs.items() if name in case).backward()


@pytest.mark.parametrize("case", golden_cases("02_diffusion_mlp", lambda case: case.cls == "DiffusionMLP"))
def test_denoising_network(case: Case) -> None:
    network = load(case)
    x = case.tensor("in/x").requires_grad_()
    out = network(x, case.tensor("in/t"), observations(case))
    FORWARD.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(case.tensors("grad/"), network)
    GRADIENT.check(x.grad, case["gin"], "x")


@pytest.mark.parametrize("case", golden_cases("02_diffusion_mlp", lambda case: "t" in case))
def test_time_embedding(case: Case) -> None:
    out = SinusoidalPosEmb(case["out"].shape[1])(case.tensor("t"))
    FORWARD.check(out, case["out"])


@pytest.mark.parametrize("case", golden_cases("02_critics", lambda case: case.cls == "CriticObs"))
def test_critic(case: Case) -> None:
    critic = load(case)
    out = critic(observations(case))[:, None]
    FORWARD.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(case.tensors("grad/"), critic)


@pytest.mark.parametrize("case", golden_cases("02_critics", lambda case: case.cls == "CriticObsAct"))
def test_action_value_critic(case: Case) -> None:
    critic = load(case)
    action = case.tensor("in/action").requires_grad_()
    values = critic(observations(case), action)
    names = ["out0", "out1"] if "out0" in case else ["out"]
    outputs = dict(zip(names, values.unbind(), strict=True))
    for name, value in outputs.items():
        FORWARD.check(value, case[name], name)
    backward(case, **{name.replace("out", "cot"): value for name, value in outputs.items()})
    check_gradients(case.tensors("grad/"), critic)
    GRADIENT.check(action.grad, case["gin"], "action")


ATTENTION_GRADIENT = Tolerance(relative=1e-4, absolute=1e-6)
"""Queries of one token have a gradient of 0, of which roundings are left."""


@pytest.mark.parametrize("case", golden_cases("02_gaussian_gmm_transformer", lambda case: "in/state" in case))
def test_gaussian_networks(case: Case) -> None:
    """Mean and std; of a mixture, the modes' logits, too."""
    network = load(case)
    outputs = network(observations(case))
    for i, out in enumerate(outputs):
        FORWARD.check(out, case[f"out{i}"], f"output {i}")
    assert f"out{len(outputs)}" not in case
    backward(case, **{f"cot{i}": out for i, out in enumerate(outputs)})
    check_gradients(case.tensors("grad/"), network, ATTENTION_GRADIENT if "Transformer" in case.cls else GRADIENT)


@pytest.mark.parametrize("case", golden_cases("02_gaussian_gmm_transformer", lambda case: case.cls == "Transformer"))
def test_transformer(case: Case) -> None:
    network = load(case)
    tokens = case.tensor("in/x").requires_grad_()
    out, embeddings = network(tokens)
    FORWARD.check(out, case["out0"], "output")
    FORWARD.check(embeddings, case["out1"], "embeddings")
    backward(case, cot0=out, cot1=embeddings)
    check_gradients(case.tensors("grad/"), network, ATTENTION_GRADIENT)
    GRADIENT.check(tokens.grad, case["gin"], "tokens")


@pytest.mark.parametrize("case", golden_cases("02_eta", lambda case: case.cls.startswith("Eta")))
def test_eta(case: Case) -> None:
    eta = load(case)
    out = eta(observations(case))
    FORWARD.check(out, case["out"])
    assert (eta.constant is None) == bool(case["requires_grad"])
    if case["requires_grad"]:
        backward(case, cot=out)
        check_gradients(case.tensors("grad/"), eta)


def real_size(case: Case) -> Shapes:
    """Parameter name -> shape, in the order of the formula; empty for arrays that are no network."""
    if "param_names" not in case:
        return {}
    names, shapes = case["param_names"], case["param_shapes"]
    return {str(name): json.loads(str(shape)) for name, shape in zip(names, shapes, strict=True)}


def formula_weights(shapes: Shapes) -> dict[str, Tensor]:
    """The parameters that the golden file defines by a formula: a cosine of the position, scaled by the fan-in."""
    weights = {}
    for j, (name, shape) in enumerate(shapes.items()):
        numel = torch.Size(shape).numel()
        wave = torch.cos(0.37 * torch.arange(numel, dtype=torch.float64) + 1.7 * j + 0.1)
        if len(shape) >= 2:
            value = wave / max(1, numel // shape[0]) ** 0.5
        else:
            value = 0.1 * wave + (1.0 if name.endswith("weight") else 0.0)
        weights[name] = value.float().view(shape)
    return weights


def real_size_cases(keep: Callable[[Shapes], bool]) -> list[Any]:
    return golden_cases("12_real_size_formula_weights", lambda case: keep(real_size(case)))


@pytest.mark.parametrize("case", real_size_cases(is_diffusion_mlp))
def test_real_size_denoising_network(case: Case) -> None:
    shapes = real_size(case)
    network = DiffusionMLP(**diffusion_mlp_options(shapes, *case["in/x"].shape[1:]))
    network.load_state_dict(formula_weights(shapes))
    with torch.no_grad():
        out = network(case.tensor("in/x"), case.tensor("in/t"), observations(case))
    FORWARD.check(out, case["out"])
    assert sum(p.numel() for p in network.parameters()) == case["n_params"]


@pytest.mark.parametrize("case", real_size_cases(lambda shapes: roots(shapes) == {"Q1"}))
def test_real_size_critic(case: Case) -> None:
    shapes = real_size(case)
    critic = critic_mlp(shapes)
    critic.load_state_dict(formula_weights(shapes))
    with torch.no_grad():
        FORWARD.check(critic(observations(case))[:, None], case["out"])
    assert sum(p.numel() for p in critic.parameters()) == case["n_params"]
