"""Our objects, built from the constructor arguments (``cfg``) and the parameters (``w/``) that golden cases hold.

Parameters stand below the reference's names: ``network`` or ``actor`` for the base policy, ``actor_ft`` for the
fine-tuned one, ``critic`` and ``eta``. Of many networks the cases hold nothing but the parameters; their widths then
follow from the shapes, and they have ACTOR_ACTIVATION or CRITIC_ACTIVATION.
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
from tests.golden_files import Case, golden_cases
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

DETERMINISTIC_STD = 1e-4
"""The reference's "deterministic" Gaussian actions are samples with this std; ours are the mean."""

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> shape, in the state dict's order."""

T = TypeVar("T")


def class_name(spec: Mapping[str, Any]) -> str:
    """The reference's class that ``spec`` describes, without its module."""
    return str(spec.get("cls") or spec["_target_"]).rpartition(".")[2]


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module that ``spec`` describes: ``{cls, kwargs}``, or the arguments together with Hydra's ``_target_``."""
    arguments = spec.get("kwargs", {key: value for key, value in spec.items() if key != "_target_"})
    return CLASSES[class_name(spec)](**arguments)


def options(schema: type[T], *sources: Mapping[str, Any]) -> T:
    """The dataclass ``schema`` with the fields that ``sources`` have; the last source wins."""
    values = {field.name: source[field.name] for source in sources for field in fields(schema) if field.name in source}
    return schema(**{key: LRConfig(**value) if isinstance(value, dict) else value for key, value in values.items()})


def below(items: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in items.items() if name.startswith(prefix)}


def roots(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in weights.items()}


def base_weights(weights: Mapping[str, T]) -> dict[str, T]:
    """Those of the base policy; where only the fine-tuned network is there, it is the base policy, too."""
    return below(weights, "actor.") or below(weights, "network.") or below(weights, "actor_ft.")


def weights_of(case: Case) -> dict[str, Tensor]:
    """The case's own, or those of the case that it names."""
    return (case.file.case(case.cfg["weights"]) if "weights" in case.cfg else case).tensors("w/")


def is_diffusion_mlp(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names is a DiffusionMLP."""
    return {"time_embedding", "mlp_mean"} <= roots(names) <= {"time_embedding", "mlp_mean", "cond_mlp"}


def is_gaussian_mlp(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names is a Gaussian_MLP."""
    parts = {"mlp_base", "mlp_mean", "mlp_logvar", "logvar", "logvar_min", "logvar_max"}
    return {"mlp_mean"} <= roots(names) <= parts


def diffusion_cases(stem: str, array: str = "cfg") -> list[Any]:
    """The cases of the file that have ``array`` and whose networks are DiffusionMLPs."""
    return golden_cases(stem, lambda case: array in case and is_diffusion_mlp(base_weights(weights_of(case))))


def gaussian_cases(stem: str, array: str = "cfg") -> list[Any]:
    """The cases of the file that have ``array`` and whose networks are Gaussian_MLPs."""
    return golden_cases(stem, lambda case: array in case and is_gaussian_mlp(base_weights(weights_of(case))))


def first_layer(trunk: Shapes) -> Sequence[int]:
    """The shape of the weight that sees the input of a plain or residual MLP."""
    return trunk["layers.0.weight" if "layers.0.weight" in trunk else "moduleList.0.linear_1.weight"]


def outputs(trunk: Shapes) -> int:
    return list(trunk.values())[-1][0]


def plain_widths(trunk: Shapes) -> list[int]:
    return [shape[0] for name, shape in trunk.items() if name.endswith("linear_1.weight")]


def trunk_options(trunk: Shapes) -> dict[str, Any]:
    """Hidden widths and style of the plain or residual MLP whose parameters have these shapes."""
    residual = "layers.0.weight" in trunk
    blocks = sum(name.endswith("l1.weight") for name in trunk)
    return {
        "mlp_dims": [first_layer(trunk)[0]] * (1 + 2 * blocks) if residual else plain_widths(trunk)[:-1],
        "residual_style": residual,
        "use_layernorm": any("norm" in name for name in trunk),
    }


def diffusion_mlp_options(shapes: Shapes, horizon_steps: int, action_dim: int) -> dict[str, Any]:
    """The arguments of the DiffusionMLP whose parameters have these shapes."""
    trunk, cond_mlp = below(shapes, "mlp_mean."), below(shapes, "cond_mlp.")
    time_dim = shapes["time_embedding.1.weight"][1]
    return {
        "action_dim": action_dim,
        "horizon_steps": horizon_steps,
        "cond_dim": first_layer(cond_mlp or trunk)[1] - (0 if cond_mlp else time_dim + horizon_steps * action_dim),
        "time_dim": time_dim,
        "cond_mlp_dims": plain_widths(cond_mlp) or None,
        "activation_type": ACTOR_ACTIVATION,
        **trunk_options(trunk),
    }


def gaussian_mlp_options(shapes: Shapes) -> dict[str, Any]:
    """The arguments of the Gaussian_MLP whose parameters have these shapes; one step long unless they tell."""
    base, mean = below(shapes, "mlp_base."), below(shapes, "mlp_mean.")
    style = trunk_options(base or mean)
    if base:
        style["mlp_dims"].append(outputs(base))
    (action_dim,) = shapes.get("logvar", (outputs(mean),))
    return {
        "action_dim": action_dim,
        "horizon_steps": outputs(mean) // action_dim,
        "cond_dim": first_layer(base or mean)[1],
        "fixed_std": None if base else 0.1,
        "learn_fixed_std": "logvar" in shapes,
        **style,
    }


def critic_mlp(shapes: Shapes) -> CriticObs:
    """The critic whose parameters have these shapes."""
    trunk = below(shapes, "Q1.")
    return CriticObs(first_layer(trunk)[1], activation_type=CRITIC_ACTIVATION, **trunk_options(trunk))


def load_critic(weights: Mapping[str, Tensor], critic: nn.Module | None = None) -> nn.Module:
    """``critic``, or the one that these parameters fit, with them."""
    own = below(weights, "critic.")
    critic = critic or critic_mlp(shapes_of(own))
    critic.load_state_dict(own)
    return critic


def diffusion_policy(
    cfg: Mapping[str, Any], weights: Mapping[str, Tensor], network: nn.Module | None = None
) -> DiffusionPolicy:
    """The policy with these weights, of ``network`` or the one that they fit."""
    dims = cfg["horizon_steps"], cfg["action_dim"]
    base = base_weights(weights)
    network = network or DiffusionMLP(**diffusion_mlp_options(shapes_of(base), *dims))
    config = options(DiffusionConfig, cfg, {} if cfg.get("use_ddim") else {"ddim_steps": None})
    eta = build(cfg["eta"]) if cfg.get("eta") else None
    assert eta is None or isinstance(eta, Eta)
    policy = DiffusionPolicy(network, config, *dims, eta)
    policy.actor.load_state_dict(base)
    if policy.actor_ft is not None:
        policy.actor_ft.load_state_dict(below(weights, "actor_ft."))
    if eta is not None:
        eta.load_state_dict(below(weights, "eta."))
    return policy


def gaussian_policy(spec: Mapping[str, Any], cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> GaussianPolicy:
    """The policy with these weights, of the network that ``spec`` describes."""
    network = build(spec)
    assert isinstance(network, GaussianMLP)
    policy = GaussianPolicy(network, options(GaussianConfig, cfg), network.horizon_steps, network.action_dim)
    policy.actor_ft.load_state_dict(below(weights, "actor_ft."))
    policy.actor.load_state_dict(base_weights(weights))
    return policy


def gaussian_of(case: Case) -> GaussianPolicy:
    """The policy of a case whose ``net`` describes all of the network but the dimensions."""
    horizon_steps, action_dim = case["in/actions"].shape[1:]
    dims = {"horizon_steps": horizon_steps, "action_dim": action_dim, "cond_dim": case["in/state"][0].size}
    return gaussian_policy({"_target_": "Gaussian_MLP", **case.cfg["net"], **dims}, case.cfg, weights_of(case))


def observations(case: Case) -> Obs:
    return {"state": case.tensor("in/state")}


def check_gradients(expected: Mapping[str, Tensor], module: nn.Module) -> None:
    """Compare the gradients of ``module``'s parameters; one that took no part has a gradient of 0."""
    assert expected
    for name, value in expected.items():
        parameter = module.get_parameter(name)
        GRADIENT.check(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, value, name)
