"""Our objects, built from the constructor arguments (``cfg``) and the parameters (``w/``) that golden cases hold.

Parameters stand below the reference's names: ``network`` or ``actor`` the base policy, ``actor_ft`` the fine-tuned one,
``critic``, ``eta``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dppo_fast.networks.critic import CriticObs
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.optim import LRConfig
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from dppo_fast.types import Obs
from tests.golden_files import Case
from tests.tolerances import GRADIENT

CLASSES: dict[str, type[nn.Module]] = {
    "DiffusionMLP": DiffusionMLP,
    "Gaussian_MLP": GaussianMLP,
    "CriticObs": CriticObs,
    "EtaFixed": EtaFixed,
    "EtaAction": EtaAction,
    "EtaState": EtaState,
    "EtaStateAction": EtaStateAction,
}
"""The reference's class names -> ours."""

ACTOR_ACTIVATION, CRITIC_ACTIVATION = "ReLU", "Mish"
"""Of the networks whose ``cfg`` does not describe them."""

Shapes = Mapping[str, Sequence[int]]
T = TypeVar("T")


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module that ``spec`` describes: ``{cls, kwargs}``, or the arguments together with Hydra's ``_target_``."""
    arguments = dict(spec["kwargs"] if "kwargs" in spec else spec)
    target = spec["cls"] if "cls" in spec else arguments.pop("_target_")
    return CLASSES[target.rpartition(".")[2]](**arguments)


def options(schema: type[T], *sources: Mapping[str, Any]) -> T:
    """The dataclass ``schema`` with the fields that ``sources`` have; the last source wins."""
    values = {field.name: source[field.name] for source in sources for field in fields(schema) if field.name in source}
    return schema(**{key: LRConfig(**value) if isinstance(value, dict) else value for key, value in values.items()})


def below(items: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in items.items() if name.startswith(prefix)}


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in weights.items()}


def roots(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def is_diffusion_mlp(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names is a DiffusionMLP."""
    return {"time_embedding", "mlp_mean"} <= roots(names) <= {"time_embedding", "mlp_mean", "cond_mlp"}


def base_weights(weights: Mapping[str, T]) -> dict[str, T]:
    """Those of the base policy; where only the fine-tuned network is there, it is the base policy, too."""
    return below(weights, "network.") or below(weights, "actor.") or below(weights, "actor_ft.")


def trunk_options(shapes: Shapes) -> dict[str, Any]:
    """The hidden widths and style of the plain or residual MLP whose parameters have these shapes."""
    residual = "layers.0.weight" in shapes
    if residual:
        blocks = sum(name.endswith("l1.weight") for name in shapes)
        widths = [shapes["layers.0.weight"][0]] * (1 + 2 * blocks)
    else:
        widths = plain_widths(shapes)[:-1]
    norm = any("norm" in name for name in shapes)
    return {"mlp_dims": widths, "residual_style": residual, "use_layernorm": norm}


def plain_widths(shapes: Shapes) -> list[int]:
    return [shape[0] for name, shape in shapes.items() if name.endswith("linear_1.weight")]


def first_layer(shapes: Shapes) -> str:
    return "layers.0.weight" if "layers.0.weight" in shapes else "moduleList.0.linear_1.weight"


def diffusion_mlp(shapes: Shapes, horizon_steps: int, action_dim: int) -> DiffusionMLP:
    """The denoising network whose parameters have these shapes."""
    trunk, cond_mlp = below(shapes, "mlp_mean."), below(shapes, "cond_mlp.")
    time_dim = shapes["time_embedding.1.weight"][1]
    encoded_dim = trunk[first_layer(trunk)][1] - time_dim - horizon_steps * action_dim
    return DiffusionMLP(
        action_dim,
        horizon_steps,
        cond_dim=cond_mlp[first_layer(cond_mlp)][1] if cond_mlp else encoded_dim,
        time_dim=time_dim,
        cond_mlp_dims=plain_widths(cond_mlp) or None,
        activation_type=ACTOR_ACTIVATION,
        **trunk_options(trunk),
    )


def gaussian_mlp(shapes: Shapes) -> GaussianMLP:
    """The Gaussian network whose parameters have these shapes, for chunks of one step."""
    base, mean = below(shapes, "mlp_base."), below(shapes, "mlp_mean.")
    if base:
        style = trunk_options(base)
        widths = style.pop("mlp_dims")
        style["mlp_dims"] = [*widths, base[list(base)[-1]][0]]
    else:
        style = trunk_options(mean)
    learned = "logvar" in shapes
    action_dim = mean[list(mean)[-1]][0]
    first = base or mean
    return GaussianMLP(
        action_dim,
        horizon_steps=1,
        cond_dim=first[first_layer(first)][1],
        fixed_std=None if base else 0.1,
        learn_fixed_std=learned,
        **style,
    )


def critic_mlp(shapes: Shapes) -> CriticObs:
    """The critic whose parameters have these shapes."""
    trunk = below(shapes, "Q1.")
    return CriticObs(trunk[first_layer(trunk)][1], activation_type=CRITIC_ACTIVATION, **trunk_options(trunk))


def load_critic(weights: Mapping[str, Tensor]) -> CriticObs:
    own = below(weights, "critic.")
    critic = critic_mlp(shapes_of(own))
    critic.load_state_dict(own)
    return critic


def diffusion_policy(
    cfg: Mapping[str, Any], weights: Mapping[str, Tensor], network: nn.Module | None = None
) -> DiffusionPolicy:
    """The policy with these weights; its network follows from their shapes unless given."""
    base = base_weights(weights)
    if network is None:
        network = diffusion_mlp(shapes_of(base), cfg["horizon_steps"], cfg["action_dim"])
    config = options(DiffusionConfig, cfg, {} if cfg.get("use_ddim") else {"ddim_steps": None})
    eta = build(cfg["eta"]) if cfg.get("eta") else None
    assert eta is None or isinstance(eta, Eta)
    policy = DiffusionPolicy(network, config, cfg["horizon_steps"], cfg["action_dim"], eta)
    policy.actor.load_state_dict(base)
    if policy.actor_ft is not None:
        policy.actor_ft.load_state_dict(below(weights, "actor_ft."))
    if eta is not None:
        eta.load_state_dict(below(weights, "eta."))
    return policy


def gaussian_policy(
    spec: Mapping[str, Any], cfg: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> GaussianPolicy:
    """The policy with these weights whose network ``spec`` describes; without other ones, the base policy is the same."""
    network = build(spec)
    assert isinstance(network, GaussianMLP)
    policy = GaussianPolicy(network, options(GaussianConfig, cfg), network.horizon_steps, network.action_dim)
    trained = below(weights, "actor_ft.")
    policy.actor_ft.load_state_dict(trained)
    policy.actor.load_state_dict(below(weights, "actor.") or trained)
    return policy


def gaussian_of(case: Case) -> GaussianPolicy:
    """The policy of a case whose ``net`` says all but the dimensions."""
    horizon_steps, action_dim = case["in/actions"].shape[1:]
    dims = {"horizon_steps": horizon_steps, "action_dim": action_dim, "cond_dim": case["in/state"][0].size}
    return gaussian_policy({"_target_": "Gaussian_MLP", **case.cfg["net"], **dims}, case.cfg, case.tensors("w/"))


def is_gaussian_mlp(case: Case) -> bool:
    return "net" in case.cfg and "num_modes" not in case.cfg["net"]


def observations(case: Case) -> Obs:
    return {"state": case.tensor("in/state")}


def check_gradients(expected: Mapping[str, Tensor], module: nn.Module) -> None:
    """Compare the gradients of ``module``'s parameters; one that took no part has a gradient of 0."""
    assert expected
    for name, value in expected.items():
        parameter = module.get_parameter(name)
        GRADIENT.check(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, value, name)
