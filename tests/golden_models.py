"""Our objects, built from the constructor arguments (``cfg``) and the parameters (``w/``) that golden cases hold.

Parameters stand below the reference's names: ``network`` or ``actor`` for the base policy, ``actor_ft`` for the
fine-tuned one, ``critic`` and ``eta``. Of many networks the cases hold nothing but the parameters; their widths then
follow from the shapes, and they have ACTOR_ACTIVATION or CRITIC_ACTIVATION, U-Nets what UNET_STYLE says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from math import isqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dppo_fast.networks.critic import CriticObs, CriticObsAct
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.gaussian import GaussianNetwork
from dppo_fast.networks.gmm import GMMMLP
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.networks.transformer import GaussianTransformer, GMMTransformer, Transformer
from dppo_fast.networks.unet1d import Unet1D
from dppo_fast.networks.vision import VisionDiffusionMLP, VisionGaussianMLP, VisionUnet1D, VitConfig, ViTCritic
from dppo_fast.optim import LRConfig
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import DensityPolicy, GaussianConfig, GaussianPolicy
from dppo_fast.policies.gmm import GMMPolicy
from dppo_fast.types import Obs
from tests.golden_files import Case, golden_cases
from tests.tolerances import GRADIENT, Tolerance

CLASSES: dict[str, type[nn.Module]] = {
    "DiffusionMLP": DiffusionMLP,
    "Unet1D": Unet1D,
    "Gaussian_MLP": GaussianMLP,
    "GMM_MLP": GMMMLP,
    "Transformer": Transformer,
    "Gaussian_Transformer": GaussianTransformer,
    "GMM_Transformer": GMMTransformer,
    "CriticObs": CriticObs,
    "CriticObsAct": CriticObsAct,
    "VisionDiffusionMLP": VisionDiffusionMLP,
    "VisionUnet1D": VisionUnet1D,
    "Gaussian_VisionMLP": VisionGaussianMLP,
    "ViTCritic": ViTCritic,
    "EtaFixed": EtaFixed,
    "EtaAction": EtaAction,
    "EtaState": EtaState,
    "EtaStateAction": EtaStateAction,
}
"""The reference's class names -> ours."""

ACTOR_ACTIVATION, CRITIC_ACTIVATION = "ReLU", "Mish"
UNET_STYLE = {"activation_type": "Mish", "n_groups": 4, "groupnorm_eps": 1e-4}

DETERMINISTIC_STD = 1e-4
"""The reference's "deterministic" Gaussian actions are samples with this std; ours are the mean."""

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> shape, in the state dict's order."""

T = TypeVar("T")


def class_name(spec: Mapping[str, Any]) -> str:
    """The reference's class that ``spec`` describes, without its module."""
    return str(spec.get("cls") or spec["_target_"]).rpartition(".")[2]


def build(spec: Mapping[str, Any], **more: Any) -> nn.Module:
    """The module that ``spec`` describes: ``{cls, kwargs}``, or the arguments together with Hydra's ``_target_``.

    ``more``: arguments of ours that the reference's class does not have.
    """
    arguments = spec.get("kwargs", {key: value for key, value in spec.items() if key != "_target_"})
    if class_name(spec) == "CriticObsAct":  # which takes residual_tyle, and ignores residual_style
        misspelt = {"residual_style": arguments.get("residual_tyle", False)}
        arguments = {key: value for key, value in arguments.items() if key != "residual_tyle"} | misspelt
    return CLASSES[class_name(spec)](**arguments, **more)


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


def is_unet(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names is a Unet1D."""
    convolutional = {"time_mlp", "down_modules", "mid_modules", "up_modules", "final_conv"}
    return {"time_mlp", "mid_modules"} <= roots(names) <= convolutional | {"cond_mlp"}


def is_gaussian_mlp(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names is a Gaussian_MLP."""
    parts = {"mlp_base", "mlp_mean", "mlp_logvar", "logvar", "logvar_min", "logvar_max"}
    return {"mlp_mean"} <= roots(names) <= parts


def is_gmm_mlp(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names is a GMM_MLP."""
    return {"mlp_mean", "mlp_weights"} <= roots(names)


def diffusion_cases(stem: str, array: str = "cfg") -> list[Any]:
    """The cases of the file that have ``array`` and whose networks are DiffusionMLPs or Unet1Ds."""

    def keep(case: Case) -> bool:
        names = base_weights(weights_of(case)) if array in case else {}
        return is_diffusion_mlp(names) or is_unet(names)

    return golden_cases(stem, keep)


def gaussian_cases(stem: str, array: str = "cfg") -> list[Any]:
    """The cases of the file that have ``array`` and whose networks are Gaussian_MLPs."""
    return golden_cases(stem, lambda case: array in case and is_gaussian_mlp(base_weights(weights_of(case))))


def gmm_cases(stem: str, array: str = "cfg") -> list[Any]:
    """The cases of the file that have ``array`` and whose networks are GMM_MLPs."""
    return golden_cases(stem, lambda case: array in case and is_gmm_mlp(base_weights(weights_of(case))))


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


def unet_options(shapes: Shapes, horizon_steps: int, **style: Any) -> dict[str, Any]:
    """The arguments of the Unet1D whose parameters have these shapes; ``style`` replaces parts of UNET_STYLE."""
    cond_mlp, block = below(shapes, "cond_mlp."), below(shapes, "mid_modules.0.")
    if "blocks.0.block.2.weight" not in block:
        style["n_groups"] = None
    levels = len(roots(below(shapes, "down_modules.")))
    widths = [shapes[f"down_modules.{i}.0.blocks.0.block.0.weight"][0] for i in range(levels)]
    time_dim = shapes["time_mlp.1.weight"][1]
    smaller = "cond_encoder.1.weight" in block
    film_dim, seen = block["cond_encoder.1.weight" if smaller else "cond_encoder.0.weight"]
    return {
        "action_dim": shapes["final_conv.1.weight"][0],
        "horizon_steps": horizon_steps,
        "cond_dim": first_layer(cond_mlp)[1] if cond_mlp else seen - time_dim,
        "diffusion_step_embed_dim": time_dim,
        "dim": widths[0],
        "dim_mults": [width // widths[0] for width in widths],
        "smaller_encoder": smaller,
        "cond_mlp_dims": [*trunk_options(cond_mlp)["mlp_dims"], outputs(cond_mlp)] if cond_mlp else None,
        "kernel_size": block["blocks.0.block.0.weight"][2],
        "cond_predict_scale": film_dim == 2 * widths[-1],
        **UNET_STYLE,
        **style,
    }


def denoising_network(shapes: Shapes, horizon_steps: int, action_dim: int) -> nn.Module:
    """The DiffusionMLP or Unet1D whose parameters have these shapes."""
    if is_unet(shapes):
        return Unet1D(**unet_options(shapes, horizon_steps))
    return DiffusionMLP(**diffusion_mlp_options(shapes, horizon_steps, action_dim))


def is_vision(names: Iterable[str]) -> bool:
    """Whether a network with parameters of these names sees images."""
    return "backbone" in roots(names)


def vision_network(shapes: Shapes, horizon_steps: int, action_dim: int, **style: Any) -> nn.Module:
    """The network for square images whose parameters have these shapes; ``style`` replaces what they do not tell."""
    vit = below(shapes, "backbone.vit.")
    stem = [(name, shape) for name, shape in vit.items() if name.startswith("patch_embed.") and len(shape) == 4]
    (_, channels, patch_size, _), overlapping = stem[0][1], len(stem) == 2
    _, patches, embed_dim = vit["pos_embed"]
    side = (isqrt(patches) + overlapping) * patch_size
    compressions = sorted(root for root in roots(shapes) if root.startswith("compress"))
    compression = below(shapes, f"{compressions[0]}.")
    spatial_emb = compression["weight"][-1] if "weight" in compression else 0
    visual_feature_dim = spatial_emb or compression["0.weight"][0]

    rest = {name: shape for name, shape in shapes.items() if name.partition(".")[0] not in {"backbone", *compressions}}
    cls: type[nn.Module]
    if is_unet(rest):
        cls, arguments = VisionUnet1D, unet_options(rest, horizon_steps)
    elif is_diffusion_mlp(rest):
        cls, arguments = VisionDiffusionMLP, diffusion_mlp_options(rest, horizon_steps, action_dim)
    elif roots(rest) == {"Q1"}:
        trunk = below(rest, "Q1.")
        cls, arguments = ViTCritic, {"cond_dim": first_layer(trunk)[1], **trunk_options(trunk)}
    else:
        cls, arguments = VisionGaussianMLP, gaussian_mlp_options(rest)
    if not arguments.get("cond_mlp_dims"):
        arguments["cond_dim"] -= len(compressions) * visual_feature_dim
    vision = {
        "image_shapes": {"rgb": (channels // 3, 3 * len(compressions), side, side)},
        "backbone": VitConfig(
            patch_size=patch_size,
            depth=len(roots(below(vit, "net."))),
            embed_dim=embed_dim,
            num_heads=4,
            embed_style="embed2" if overlapping else "embed1",
            embed_norm="patch_embed.embed.1.weight" in vit,
        ),
        "img_cond_steps": channels // 3,
        "spatial_emb": spatial_emb,
        "visual_feature_dim": visual_feature_dim,
    }
    return cls(**{**arguments, **vision, **style})


def vision_case(case: Case) -> nn.Module:
    """The network that the case's ``cfg`` and ``bb/cfg`` describe; shifting images is not the network's part."""
    arguments = {key: value for key, value in case.cfg["kwargs"].items() if key != "augment"}
    if case.cls == "VisionUnet1D":
        arguments["horizon_steps"] = case["in/x"].shape[1]
    backbone = options(VitConfig, json.loads(str(case["bb/cfg"]))["cfg"])
    return CLASSES[case.cls](image_shapes={"rgb": case["in/rgb"].shape[1:]}, backbone=backbone, **arguments)


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
        "fixed_std": None if "mlp_logvar" in roots(shapes) else 0.1,
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
    network = network or denoising_network(shapes_of(base), *dims)
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


def gaussian_policy(
    spec: Mapping[str, Any], cfg: Mapping[str, Any], weights: Mapping[str, Tensor], clamp_log_prob: bool = False
) -> DensityPolicy:
    """The policy with these weights, a Gaussian or a mixture, of the network that ``spec`` describes."""
    network = build(spec)
    assert isinstance(network, GaussianNetwork)
    cls = GMMPolicy if class_name(spec).startswith("GMM") else GaussianPolicy
    config = options(GaussianConfig, cfg)
    policy = cls(network, config, network.horizon_steps, network.action_dim, clamp_log_prob)
    policy.actor_ft.load_state_dict(below(weights, "actor_ft."))
    policy.actor.load_state_dict(base_weights(weights))
    return policy


def gaussian_of(case: Case, clamp_log_prob: bool = False) -> DensityPolicy:
    """The policy of a case whose ``net`` describes all of the network but the dimensions."""
    horizon_steps, action_dim = case["in/actions"].shape[1:]
    dims = {"horizon_steps": horizon_steps, "action_dim": action_dim, "cond_dim": case["in/state"][0].size}
    weights = weights_of(case)
    cls = "GMM_MLP" if is_gmm_mlp(base_weights(weights)) else "Gaussian_MLP"
    return gaussian_policy({"_target_": cls, **case.cfg["net"], **dims}, case.cfg, weights, clamp_log_prob)


def observations(case: Case) -> Obs:
    return {name: case.tensor(f"in/{name}") for name in ("state", "rgb") if f"in/{name}" in case}


def check_gradients(expected: Mapping[str, Tensor], module: nn.Module, tolerance: Tolerance = GRADIENT) -> None:
    """Compare the gradients of ``module``'s parameters; one that took no part has a gradient of 0."""
    assert expected
    for name, value in expected.items():
        parameter = module.get_parameter(name)
        tolerance.check(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, value, name)
