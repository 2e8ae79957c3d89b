"""Objects with the class names and the interface of the reference's policies; their own methods only count calls.

What the reference's methods would return is known from golden cases, which are such objects' arguments and weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.denoise_step import posterior_mean
from dppo_fast.networks.eta import EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.mlp import DiffusionMLP as OurDiffusionMLP
from dppo_fast.networks.unet1d import Unet1D as OurUnet1D
from dppo_fast.types import Obs
from tests.golden_models import (
    base_weights,
    below,
    build,
    critic_mlp,
    diffusion_mlp_options,
    is_unet,
    roots,
    shapes_of,
    unet_options,
)


class Network(nn.Module):
    """Ours, called as theirs are."""

    def forward(self, x: Tensor, t: Tensor, cond: Obs) -> Tensor:
        out: Tensor = super().forward(x, t, cond)
        return out


class DiffusionMLP(Network, OurDiffusionMLP): ...


class Unet1D(Network, OurUnet1D): ...


def their_attributes(eta: nn.Module) -> nn.Module:
    """``eta`` with the bounds where theirs has them."""
    if isinstance(eta, EtaFixed | EtaAction):
        eta.min, eta.max = eta.min_eta, eta.max_eta  # type: ignore[assignment]
    if isinstance(eta, EtaState | EtaStateAction):
        eta.base = eta.base_eta  # type: ignore[assignment]
        eta.min_res, eta.max_res = eta.min_eta - eta.base_eta, eta.max_eta - eta.base_eta  # type: ignore[assignment]
    return eta


DEFAULTS = {
    "predict_epsilon": True,
    "use_ddim": False,
    "ddim_steps": None,
    "denoised_clip_value": 1.0,
    "randn_clip_value": 10,
    "eps_clip_value": None,
    "final_action_clip_value": None,
    "clip_ploss_coef_base": 1e-3,
    "clip_ploss_coef_rate": 3,
    "clip_vloss_coef": None,
    "clip_advantage_lower_quantile": 0,
    "clip_advantage_upper_quantile": 1,
    "norm_adv": True,
}
"""Of the constructors' arguments, which become attributes."""


class DiffusionModel(nn.Module):
    """``calls`` counts those of its own methods."""

    def __init__(self, network: nn.Module, cfg: Mapping[str, Any], critic: nn.Module | None = None) -> None:
        super().__init__()
        modules = ("network", "actor", "critic", "eta")
        vars(self).update({name: value for name, value in {**DEFAULTS, **cfg}.items() if name not in modules})
        self.network = network
        ddim_steps = self.ddim_steps if self.use_ddim else None
        self.schedule = NoiseSchedule(self.denoising_steps, ddim_steps, self.predict_epsilon)
        self.betas = torch.zeros(self.denoising_steps)
        self.calls: Counter[str] = Counter()

    def mean(self, x: Tensor, index: Tensor, cond: Obs, eta: Tensor | None) -> Tensor:
        """Of x' given x at steps ``index`` in the order of sampling."""
        base, ft = getattr(self, "actor", self.network), getattr(self, "actor_ft", None)
        t, first = self.schedule.timesteps[index], self.schedule.steps - vars(self).get("ft_denoising_steps", 0)
        eps = base(x, t, cond=cond)
        if ft is not None:
            eps = torch.where((index >= first)[:, None, None], ft(x, t, cond=cond), eps)
        row = self.schedule.coefficients(index, eta is None, eta if self.use_ddim else None)
        return posterior_mean(eps, x, row, self.denoised_clip_value, self.eps_clip_value if self.use_ddim else None)

    def p_mean_var(self, x: Tensor, t: Tensor, cond: Obs, index: Any = None, network_override: Any = None) -> Any:
        return self.mean(x, index, cond, None), None

    def forward(self, cond: Obs, deterministic: bool = True) -> Any:
        self.calls["forward"] += 1

    def loss(self, x: Tensor, *args: Any) -> Any:
        return self.p_losses(x, *args, torch.randint(0, self.denoising_steps, (len(x),)))

    def p_losses(self, x_start: Tensor, cond: Obs, t: Tensor) -> Any:
        self.calls["p_losses"] += 1


class DiffusionEval(DiffusionModel):
    def __init__(self, network: nn.Module, cfg: Mapping[str, Any], critic: nn.Module | None = None) -> None:
        super().__init__(network, cfg)
        self.actor = self.network
        self.actor_ft = copy.deepcopy(network)

    def p_mean_var(  # type: ignore[override]
        self, x: Tensor, t: Tensor, cond: Obs, index: Any = None, deterministic: bool = False
    ) -> Any:
        assert deterministic, "it has no eta"
        return self.mean(x, index, cond, None), None


class VPGDiffusion(DiffusionModel):
    def __init__(self, network: nn.Module, cfg: Mapping[str, Any], critic: nn.Module | None = None) -> None:
        super().__init__(network, cfg)
        if cfg.get("eta"):
            self.eta = their_attributes(build(cfg["eta"]))
        self.actor = self.network
        self.actor_ft = copy.deepcopy(network)
        self.actor.requires_grad_(False)
        self.critic = critic

    def p_mean_var(  # type: ignore[override]
        self, x: Tensor, t: Tensor, cond: Obs, index: Any = None, use_base_policy: bool = False,
        deterministic: bool = False,
    ) -> Any:  # fmt: skip
        eta = None if deterministic or not self.use_ddim else self.eta(cond)
        return self.mean(x, index, cond, eta), None, eta

    def forward(  # type: ignore[override]
        self, cond: Obs, deterministic: bool = False, return_chain: bool = True, use_base_policy: bool = False
    ) -> Any:
        self.calls["forward"] += 1

    def get_logprobs(self, cond: Obs, chains: Tensor, get_ent: bool = False, use_base_policy: bool = False) -> Any:
        self.calls["get_logprobs"] += 1

    def get_logprobs_subsample(
        self, cond: Obs, chains_prev: Tensor, chains_next: Tensor, denoising_inds: Tensor, get_ent: bool = False,
        use_base_policy: bool = False,
    ) -> Any:  # fmt: skip
        self.calls["get_logprobs_subsample"] += 1

    def step(self) -> None:
        """Anneal: one fine-tuned step fewer, by new modules."""
        self.ft_denoising_steps -= 1
        self.actor = self.actor_ft
        self.actor_ft = copy.deepcopy(self.actor)


class PPODiffusion(VPGDiffusion):
    def loss(  # type: ignore[override]
        self, obs: Obs, chains_prev: Tensor, chains_next: Tensor, denoising_inds: Tensor, returns: Tensor,
        oldvalues: Tensor, advantages: Tensor, oldlogprobs: Tensor, use_bc_loss: bool = False, reward_horizon: int = 4,
    ) -> Any:  # fmt: skip
        self.calls["loss"] += 1


def model(cls: type[DiffusionModel], cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The object with these arguments and weights."""
    base, (Th, Da) = base_weights(weights), (cfg["horizon_steps"], cfg["action_dim"])
    shapes, critic = shapes_of(base), shapes_of(below(weights, "critic."))
    unet = is_unet(shapes)
    network = Unet1D(**unet_options(shapes, Th)) if unet else DiffusionMLP(**diffusion_mlp_options(shapes, Th, Da))
    made = cls(network, {"ft_denoising_steps": 0, **cfg}, critic_mlp(critic) if critic else None)
    for name in roots(name for name, _ in made.named_parameters()):
        made.get_submodule(name).load_state_dict(below(weights, f"{name}.") or base)
    return made
