"""The reference's checkpoints load: its configurations' parameter names and shapes, and policies that act the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from torch import Tensor, nn

from dppo_fast.build import CRITICS, build_policy, load_base, load_trained, parse
from dppo_fast.checkpoint import load_policy_weights, load_weights
from dppo_fast.cli import config_folder, config_names
from dppo_fast.config import plain
from dppo_fast.networks.eta import EtaAction, EtaFixed, EtaStateAction
from dppo_fast.networks.mlp import GaussianMLP
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from tests.golden_files import Case, golden_cases
from tests.golden_models import (
    Shapes,
    base_weights,
    below,
    critic_mlp,
    denoising_network,
    diffusion_cases,
    diffusion_mlp_options,
    diffusion_policy,
    first_layer,
    gaussian_cases,
    gaussian_mlp_options,
    gaussian_of,
    is_diffusion_mlp,
    is_gaussian_mlp,
    is_unet,
    observations,
    outputs,
    roots,
    shapes_of,
    trunk_options,
    unet_options,
    weights_of,
)
from tests.tolerances import LOG_PROB, SAMPLE


def shapes_in(case: Case) -> Shapes:
    """Parameter name -> shape, as the reference's state dict has them."""
    return {str(name): tuple(json.loads(str(shape))) for name, shape in zip(case["names"], case["shapes"], strict=True)}


def without_copies(shapes: Shapes) -> Shapes:
    """``network`` repeats ``actor``; alone, it is the actor."""
    actor = {f"actor.{name}": shape for name, shape in base_weights(shapes).items()}
    return {name: shape for name, shape in shapes.items() if not name.startswith("network.")} | actor


def is_supported(case: Case) -> bool:
    """Whether the model is a diffusion MLP, a U-Net or a Gaussian MLP with at most a state-value critic and an eta."""
    shapes = shapes_in(case)
    base = roots(base_weights(shapes))
    actor = is_diffusion_mlp(base) or is_unet(base) or is_gaussian_mlp(base)
    others = roots(shapes) - {"network", "actor", "actor_ft", "eta", "critic"}
    return actor and not others and roots(below(shapes, "critic.")) <= {"Q1"}


def network_options(shapes: Shapes, horizon_steps: int | None = None) -> dict[str, Any]:
    """The arguments of the base policy's network; as short as can be unless its parameters or the caller tell."""
    base = base_weights(shapes)
    if is_unet(base):
        return unet_options(base, horizon_steps or 2 ** len(roots(below(base, "up_modules."))))
    if not is_diffusion_mlp(base):
        return gaussian_mlp_options(base)
    chunk = outputs(base)
    horizon_steps = horizon_steps or 1
    return diffusion_mlp_options(base, horizon_steps, chunk // horizon_steps)


def build_eta(shapes: Shapes) -> nn.Module | None:
    if not shapes:
        return None
    if "eta_logit" in shapes:
        (action_dim,) = shapes["eta_logit"]
        return EtaFixed() if action_dim == 1 else EtaAction(action_dim)
    trunk = below(shapes, "mlp_res.")
    return EtaStateAction(first_layer(trunk)[1], outputs(trunk), trunk_options(trunk)["mlp_dims"])


def modules_of(policy: nn.Module, critic: nn.Module | None, fine_tuned: bool) -> nn.ModuleDict:
    """The modules by the reference's names."""
    modules = {"actor": policy.actor, "critic": critic, "eta": getattr(policy, "eta", None)}
    if fine_tuned:
        modules["actor_ft"] = policy.actor_ft
    return nn.ModuleDict({name: module for name, module in modules.items() if module is not None})


def build_model(shapes: Shapes) -> nn.ModuleDict:
    """Our policy and critic for a model whose parameters have these shapes."""
    fine_tuned, arguments = "actor_ft" in roots(shapes), network_options(shapes)
    dims = arguments["horizon_steps"], arguments["action_dim"]
    policy: nn.Module
    base = base_weights(shapes)
    if is_gaussian_mlp(base):
        policy = GaussianPolicy(GaussianMLP(**arguments), GaussianConfig(), *dims)
        if not fine_tuned:
            policy.actor = policy.actor_ft
    else:
        config = DiffusionConfig(ft_denoising_steps=int(fine_tuned))
        network = denoising_network(base, *dims)
        policy = DiffusionPolicy(network, config, *dims, build_eta(below(shapes, "eta.")))
    critic = critic_mlp(below(shapes, "critic.")) if "critic" in roots(shapes) else None
    return modules_of(policy, critic, fine_tuned)


MODELS = golden_cases("13_state_dict_names", is_supported, array="names")
OURS = set(config_names())


@pytest.mark.parametrize("case", MODELS)
def test_parameters_of_the_references_configurations(case: Case) -> None:
    shapes = shapes_in(case)
    model = build_model(shapes)
    assert shapes_of(model.state_dict()) == without_copies(shapes)
    assert sum(p.numel() for p in model.parameters()) == case["n_params_unique"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case["n_trainable"]


@pytest.mark.parametrize("case", [param for param in MODELS if param.values[0].name in OURS])
def test_parameters_of_our_configurations(case: Case) -> None:
    shapes = shapes_in(case)
    with hydra.initialize_config_dir(str(config_folder()), version_base=None):
        config = parse(plain(hydra.compose(case.name, overrides=["logdir=unused"])))
    theirs = network_options(shapes, config.task.horizon_steps)
    obs_dim = theirs["cond_dim"]
    action_dim = theirs["action_dim"] * theirs["horizon_steps"] // config.task.horizon_steps
    policy = build_policy(config, {"state": (1, obs_dim)}, action_dim, seed=0)
    critic = None
    if config.critic is not None:
        arguments = dict(config.critic)
        critic = CRITICS[arguments.pop("name")](cond_dim=obs_dim, **arguments)
    model = modules_of(policy, critic, "actor_ft" in roots(shapes))
    assert shapes_of(model.state_dict()) == without_copies(shapes)


def reference_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Random parameters; ``network`` and ``actor`` share theirs, as in the reference."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in without_copies(shapes).items()}
    return {name: weights[name.replace("network.", "actor.", 1)] for name in shapes}


@pytest.mark.parametrize("case", MODELS)
def test_checkpoints_in_the_references_format(case: Case, tmp_path: Path) -> None:
    shapes = shapes_in(case)
    weights, file = reference_weights(shapes), tmp_path / "state_1.pt"
    if "actor_ft" in roots(shapes):
        torch.save({"itr": 1, "model": weights}, file)
    else:
        raw = {name: torch.zeros_like(value) for name, value in weights.items()}
        torch.save({"epoch": 1, "model": raw, "ema": weights}, file)
    loaded, model = load_policy_weights(file), build_model(shapes)
    for name, module in model.items():
        load_weights(module, getattr(loaded, name), name)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name if name in weights else name.replace("actor.", "network.", 1)])


def forget(policy: nn.Module) -> None:
    """Replace all weights by others."""
    for parameter in policy.parameters():
        nn.init.uniform_(parameter)


@pytest.mark.parametrize("case", diffusion_cases("04_eval_sampling"))
def test_fine_tuned_checkpoints_act_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    weights, file = weights_of(case), tmp_path / "state_1.pt"
    actor = {f"actor.{name}": value for name, value in base_weights(weights).items()}
    torch.save({"itr": 1, "model": weights | actor}, file)
    policy = diffusion_policy(case.cfg, weights)
    forget(policy)
    load_trained(policy, load_policy_weights(file))
    chain = policy.sample(observations(case), case.tensor("det/noise"), deterministic=True)
    SAMPLE.check(chain.action, case["det/trajectories"])


@pytest.mark.parametrize("case", diffusion_cases("04_base_sampling"))
def test_pretrained_checkpoints_act_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    weights, file = weights_of(case), tmp_path / "state_1.pt"
    raw = {name: torch.rand_like(value) for name, value in weights.items()}
    torch.save({"epoch": 1, "model": raw, "ema": weights}, file)
    policy = diffusion_policy(case.cfg, weights)
    forget(policy)
    load_base(policy, load_policy_weights(file))
    chain = policy.sample(observations(case), case.tensor("noise"), deterministic=True)
    SAMPLE.check(chain.action, case["trajectories"])


@pytest.mark.parametrize("case", gaussian_cases("08_gaussian_gmm_ppo"))
def test_gaussian_checkpoints_score_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "state_1.pt"
    torch.save({"itr": 1, "model": case.tensors("w/")}, file)
    policy = gaussian_of(case)
    forget(policy)
    load_trained(policy, load_policy_weights(file))
    action = case.tensor("in/actions")
    log_prob = policy.log_prob(observations(case), {"action": action}, torch.zeros(len(action), dtype=torch.int64))
    LOG_PROB.check(log_prob, case["logprobs"])
