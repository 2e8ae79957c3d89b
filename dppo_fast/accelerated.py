"""A drop-in for the policy objects of the reference, irom-princeton/dppo, and of its forks.

Nothing of theirs is imported: a live object is recognised by the names of its classes, methods and arguments.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from dppo_fast.advantage import normalize_advantage
from dppo_fast.diffusion.likelihood import denoising_errors, predict
from dppo_fast.diffusion.sampler import Chain
from dppo_fast.kernels.denoise_step import LOG_PROB_RANGE, chunk_log_prob, posterior_mean
from dppo_fast.kernels.ppo_loss import value_loss
from dppo_fast.networks.embed import ACTIVATIONS
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.networks.unet1d import Unet1D
from dppo_fast.networks.vision import VisionDiffusionMLP, VisionUnet1D, VitConfig
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.runtime.graph import GraphedFunction
from dppo_fast.types import Obs, ObsShapes, UserError

TOLERANCE = 1e-3
"""How far, relative to the largest, the means of the denoising steps may be from the original's before its formulas
count as others.
"""

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Mode: TypeAlias = tuple[bool, bool, bool]
"""How to sample: deterministic, with the chain, by the base policy."""


class Sample(NamedTuple):
    """``trajectories`` [B, Th, Da], ``chains`` [B, F + 1, Th, Da] or None."""

    trajectories: Tensor
    chains: Tensor | None


def accelerate(model: Model, strict: bool = False) -> Model:
    """``model``, a DiffusionModel, DiffusionEval, VPGDiffusion or PPODiffusion, with our methods for its slow ones.

    The new object is of a subclass of the model's class and shares its ``__dict__``: what trains, anneals or loads one
    of the two does it to both. Signatures and returns stay. Ours are sampling (``forward``), ``get_logprobs``,
    ``get_logprobs_subsample``, ``p_losses`` (of which ``loss`` makes the pre-training loss) and PPO's ``loss``, each
    where the model has it from one of these classes; all else is the model's own. They draw the noise that the original
    would draw from PyTorch's generator, or take it as ``noise=``: [S + 1, B, Th, Da] for a chain, [B, Th, Da] for
    ``p_losses``.

    A call for something that only the model's own method knows, such as an argument that a fork added, goes there, with
    one line in the log, or raises UserError if ``strict``; so does a method without our arguments. UserError is also
    raised for models and networks of unknown classes, for parameters that do not fit, and where the denoising steps
    give other numbers than the original's.
    """
    originals = dict(inspect.getmembers(type(model), inspect.isfunction))
    known = {name: METHODS[theirs.__qualname__] for name, theirs in originals.items() if theirs.__qualname__ in METHODS}
    if not known:
        classes = ", ".join(sorted({name.partition(".")[0] for name in METHODS}))
        raise UserError(
            f"accelerate: {type(model).__name__} is unknown: it is none of {classes}, nor derived from them"
        )
    fast = _Fast(model, strict)
    methods = {name: method for name, ours in known.items() if (method := _method(originals[name], ours, fast))}
    cls: Any = type(f"Accelerated{type(model).__name__}", (type(model),), methods)
    accelerated: Model = cls.__new__(cls)
    accelerated.__dict__ = model.__dict__
    return accelerated


def _arguments(function: Callable[..., Any]) -> list[str]:
    """The names of all but keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]


def _method(theirs: Callable[..., Any], ours: Callable[..., Any], fast: _Fast) -> Callable[..., Any] | None:
    """``ours`` as a method with the signature of ``theirs``, to which it falls back; None if that lacks arguments."""
    signature, (_, *names), (_, _, *shared) = inspect.signature(theirs), _arguments(theirs), _arguments(ours)
    if names[: len(shared)] != shared:
        fast.leave(theirs, f"its arguments are not {', '.join(shared)}")
        return None
    observation = "obs" if "obs" in names else "cond"

    @wraps(theirs)
    def method(model: nn.Module, *args: Any, noise: Tensor | None = None, **kwargs: Any) -> Any:
        given = signature.bind(model, *args, **kwargs).arguments
        added = [name for name in names[len(shared) :] if name in given]
        also = {"noise_action"} if ours is _forward_evaluation and _steered(model) else set()
        obstacle = f"{added[0]} is given" if added else fast.obstacle(model, given[observation], also)
        if obstacle is None:
            return ours(model, fast, *args, **({} if noise is None else {"noise": noise}), **kwargs)
        fast.leave(theirs, obstacle, noise is not None)
        return theirs(model, *args, **kwargs)

    return method


class _Fast:
    """What accelerated objects have beside the state that they share with the original.

    Raises UserError where the original's denoising steps give other numbers.
    """

    def __init__(self, model: Any, strict: bool) -> None:
        self.strict = strict
        self.logged: set[str] = set()
        self.key: tuple[Any, ...] = ()
        _check_steps(model, self.policy(model), self.obs_shapes)

    def policy(self, model: Any) -> DiffusionPolicy:
        """Ours with the model's parameters and its present settings."""
        key = _config(model), *(model._modules.get(name) for name in ("network", "actor", "actor_ft", "eta"))
        if key != self.key:
            self._policy, self.obs_shapes = _build(model, key[0])
            self.dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
            self.sampler = GraphedFunction(self._sample, enabled=model.betas.device.type == "cuda")
            self.key = key
        return self._policy

    def sample(self, model: Any, cond: Obs, noise: Tensor | None, mode: Mode, first: Tensor | None = None) -> Chain:
        """A chain that begins with ``noise[0]``, or ``first``, or what is drawn."""
        noise = _noise(model, self.policy(model), len(cond["state"]), noise, first)
        chain = self.sampler({**self.obs(cond), "noise": noise}, mode)
        if not self.sampler.enabled:
            return chain
        return Chain(chain.action.clone(), None if chain.points is None else chain.points.clone())

    def _sample(self, inputs: Mapping[str, Tensor], mode: Mode) -> Chain:
        return self._policy.sample(self.obs(inputs), inputs["noise"], *mode)

    def obs(self, cond: Mapping[str, Tensor]) -> Obs:
        """What the network sees of ``cond``."""
        return {name: cond[name] for name in self.obs_shapes}

    def obstacle(self, model: Any, cond: Mapping[str, Tensor], also: set[str]) -> str | None:
        """Why a call has to be the original's, which takes ``also`` beside the observation. Raises UserError where that
        does not fit the network.
        """
        self.policy(model)
        for name, shape in self.obs_shapes.items():
            if name not in cond:
                raise UserError(f"the observation has no {name!r}, only {', '.join(sorted(cond))}")
            given, needed = (_frame(name, tuple(s)) for s in (cond[name].shape[1:], shape))
            if given != needed:
                raise UserError(f"the observation's {name!r} is of another task: {given}, the network takes {needed}")
        if unknown := cond.keys() - self.obs_shapes.keys() - also:
            return f"the observation holds {', '.join(sorted(unknown))}"
        if getattr(model.network, "augment", False):
            return "the network shifts images at random (augment=True)"
        if any(dropout.training for dropout in self.dropouts):
            return "dropout is active"
        if vars(model).get("ft_denoising_steps") == 0 and hasattr(model, "get_logprobs"):
            return "ft_denoising_steps=0"
        return None

    def leave(self, theirs: Callable[..., Any], obstacle: str, noise: bool = False) -> None:
        """Say once that the original method runs. Raises UserError if that is not wanted, or cannot take ``noise``."""
        if self.strict or noise:
            raise UserError(f"{theirs.__qualname__}: {obstacle}, which only the original method knows")
        message = f"{theirs.__qualname__}: {obstacle}; the original method runs instead"
        if message not in self.logged:
            self.logged.add(message)
            log.warning(message)


def _frame(name: str, shape: tuple[int, ...]) -> str:
    """What the network sees of an observation [To, ...]: all of a state's numbers, of images as many steps as it
    wants.
    """
    return f"{math.prod(shape)} numbers" if name == "state" else f"images {list(shape[1:])}"


def _steered(model: Any) -> bool:
    """Whether evaluation's observations bring the chain's first x, as in DSRL (Wagenmaker et al. 2025, arXiv
    2506.15799).
    """
    return bool(vars(model).get("controllable_noise"))


def _noise(model: Any, policy: DiffusionPolicy, batch: int, noise: Tensor | None, first: Tensor | None) -> Tensor:
    """``noise``, or what the original would draw, after ``first`` where that is given: [S + 1, B, Th, Da]."""
    shape = (policy.schedule.steps + 1, batch, policy.horizon_steps, policy.action_dim)
    if noise is None:
        noise = torch.empty(shape, device=model.betas.device)
        if first is not None:
            noise[0] = first
        for draw in noise[int(first is not None) :]:
            draw.normal_()
    if noise.shape != shape:
        raise UserError(f"noise has shape {list(noise.shape)}, expected [S + 1, B, Th, Da] = {list(shape)}")
    return noise


def _forward_evaluation(
    model: Any, fast: _Fast, cond: Obs, deterministic: bool = True, *, noise: Tensor | None = None
) -> Sample:
    first = cond["noise_action"] if _steered(model) else None
    return Sample(fast.sample(model, cond, noise, (True, False, False), first).action, None)


def _forward(
    model: Any,
    fast: _Fast,
    cond: Obs,
    deterministic: bool = False,
    return_chain: bool = True,
    use_base_policy: bool = False,
    *,
    noise: Tensor | None = None,
) -> Sample:
    chain = fast.sample(model, cond, noise, (deterministic, return_chain, use_base_policy))
    return Sample(chain.action, chain.points)


def _get_logprobs(
    model: Any, fast: _Fast, cond: Obs, chains: Tensor, get_ent: bool = False, use_base_policy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    F = fast.policy(model).ft_steps
    repeated = {name: value.repeat_interleave(F, 0) for name, value in fast.obs(cond).items()}
    k = torch.arange(F, device=chains.device).repeat(len(chains))
    x, x_next = chains[:, :-1].flatten(0, 1), chains[:, 1:].flatten(0, 1)
    return _get_logprobs_subsample(model, fast, repeated, x, x_next, k, get_ent, use_base_policy)


def _get_logprobs_subsample(
    model: Any,
    fast: _Fast,
    cond: Obs,
    chains_prev: Tensor,
    chains_next: Tensor,
    denoising_inds: Tensor,
    get_ent: bool = False,
    use_base_policy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    policy, obs = fast.policy(model), fast.obs(cond)
    log_prob = policy.log_density(obs, chains_prev, chains_next, denoising_inds, use_base_policy)
    if not get_ent:
        return log_prob
    eta = policy.eta_of(obs)
    if eta is not None:
        return log_prob, eta[:, None]
    constant = policy.entropy(obs)
    return log_prob, constant.expand((len(log_prob), 1, 1) if policy.schedule.ddim else log_prob.shape)


def _p_losses(model: Any, fast: _Fast, x_start: Tensor, cond: Obs, t: Tensor, *, noise: Tensor | None = None) -> Tensor:
    policy = fast.policy(model)
    noise = torch.randn_like(x_start) if noise is None else noise
    predicts_noise = policy.config.predict_epsilon
    return denoising_errors(policy.actor, policy.schedule, fast.obs(cond), x_start, t, noise, predicts_noise).mean()


def _loss(
    model: Any,
    fast: _Fast,
    obs: Obs,
    chains_prev: Tensor,
    chains_next: Tensor,
    denoising_inds: Tensor,
    returns: Tensor,
    oldvalues: Tensor,
    advantages: Tensor,
    oldlogprobs: Tensor,
    use_bc_loss: bool = False,
    reward_horizon: int = 4,
    *,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, float, float, float, Tensor | int, float]:
    """Policy, entropy and value loss, clip fraction, approx_kl, ratio, behaviour-cloning loss, eta."""
    from dppo_fast.algorithms.dppo import DPPOConfig, chain_policy_loss, step_tables  # needed for training alone

    policy, config, seen = fast.policy(model), DPPOConfig(**_settings(model, DPPOConfig)), fast.obs(obs)
    policy.reward_horizon = min(reward_horizon, policy.horizon_steps)
    bc_loss: Tensor | int = 0
    if use_bc_loss:
        chains = model.forward(obs, use_base_policy=True, noise=noise).chains
        bc_loss = -model.get_logprobs(obs, chains).clamp(*LOG_PROB_RANGE).mean()
    pg = chain_policy_loss(
        policy,
        seen,
        {"x": chains_prev, "x_next": chains_next},
        denoising_inds,
        chunk_log_prob(oldlogprobs, policy.reward_horizon),
        normalize_advantage(
            advantages, config.norm_adv, config.clip_advantage_lower_quantile, config.clip_advantage_upper_quantile
        ),
        *step_tables(config, policy.ft_steps, chains_prev.device),
    )
    v_loss = value_loss(model.critic(obs).view(-1), returns, oldvalues, config.clip_vloss_coef)
    eta = policy.entropy(seen)
    clipfrac, approx_kl, ratio, mean_eta = torch.stack(
        (pg.clip_fraction, pg.approx_kl, pg.ratio.detach(), eta.detach())
    ).tolist()
    return pg.loss, -eta, v_loss, clipfrac, approx_kl, ratio, bc_loss, mean_eta


METHODS: dict[str, Callable[..., Any]] = {
    "DiffusionModel.forward": _forward_evaluation,
    "DiffusionModel.p_losses": _p_losses,
    "VPGDiffusion.forward": _forward,
    "VPGDiffusion.get_logprobs": _get_logprobs,
    "VPGDiffusion.get_logprobs_subsample": _get_logprobs_subsample,
    "PPODiffusion.loss": _loss,
}
"""What is replaced, by class and method, and with what; DiffusionEval is a DiffusionModel."""


def _settings(model: Any, schema: type[Any]) -> dict[str, Any]:
    """The fields of ``schema`` that the model has as attributes."""
    own = vars(model)
    return {field.name: own[field.name] for field in fields(schema) if field.name in own}


def _config(model: Any) -> DiffusionConfig:
    settings = _settings(model, DiffusionConfig)
    if not model.use_ddim:
        settings |= {"ddim_steps": None, "eps_clip_value": None}
    if callable(std := settings.get("min_sampling_denoising_std")):  # a schedule
        settings["min_sampling_denoising_std"] = float(std())
    return DiffusionConfig(**settings)


def _build(model: Any, config: DiffusionConfig) -> tuple[DiffusionPolicy, ObsShapes]:
    """Our policy with the model's parameters, and the shapes of the observations [To, ...] that it sees."""
    base, base_eta = getattr(model, "actor", model.network), getattr(model, "eta", None)
    Th, Da = model.horizon_steps, model.action_dim
    with torch.random.fork_rng(devices=[]):
        make, describe = _choose(NETWORKS, base, "network")
        arguments: dict[str, Any] = describe(base, Th * Da)
        network = make(action_dim=Da, horizon_steps=Th, **arguments)
        eta = None if base_eta is None else _choose(ETAS, base_eta, "eta")(base_eta)
        policy = DiffusionPolicy(network, config, Th, Da, eta).to(model.betas.device)
    for ours, theirs in ((policy.actor, base), (policy.actor_ft, getattr(model, "actor_ft", None)), (eta, base_eta)):
        if ours is not None:
            _share(ours, theirs)
    return policy, {"state": (1, arguments["cond_dim"]), **arguments.get("image_shapes", {})}


T = TypeVar("T")


def _choose(table: Mapping[str, T], module: nn.Module, what: str) -> T:
    """The entry for the class of ``module`` or the nearest of its ancestors."""
    for cls in type(module).__mro__:
        if cls.__name__ in table:
            return table[cls.__name__]
    raise UserError(f"accelerate: the {what} {type(module).__name__} is unknown; it may be {', '.join(table)}")


def _share(ours: nn.Module, theirs: Any) -> None:
    """Let ``ours`` have the parameters of ``theirs``, now and whenever they are exchanged for others."""
    own, live = (
        {name: f"{parameter.dtype} {list(parameter.shape)}" for name, parameter in module.named_parameters()}
        for module in (ours, theirs)
    )
    for name in sorted(own.keys() | live.keys()):
        if own.get(name) != live.get(name):
            found, expected = live.get(name, "missing"), own.get(name, "no such parameter")
            raise UserError(f"accelerate: {type(theirs).__name__}'s {name} is {found}, expected {expected}")
    for name, module in ours.named_modules():
        if module._parameters:
            module._parameters = theirs.get_submodule(name)._parameters


@torch.no_grad()
def _check_steps(model: Any, policy: DiffusionPolicy, obs_shapes: ObsShapes) -> None:
    """Compare a random transition of every denoising step with the original's."""
    schedule, first, device = policy.schedule, policy.first_ft_step, model.betas.device
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (policy.horizon_steps, policy.action_dim), **obs_shapes}
    inputs = {
        name: torch.rand(schedule.steps, *shape, generator=generator).to(device) for name, shape in shapes.items()
    }
    x, k = inputs.pop("x"), torch.arange(schedule.steps, device=device)
    eta = None if policy.eta is None else policy.eta(inputs)
    takes_mode = "deterministic" in inspect.signature(model.p_mean_var).parameters
    mode = {"deterministic": eta is None} if takes_mode else {}
    theirs = model.p_mean_var(x.clone(), schedule.timesteps, cond=inputs, index=k, **mode)[0]
    eps = predict(policy.actor, schedule, inputs, x, k)
    if policy.actor_ft is not None:
        eps[first:] = predict(policy.actor_ft, schedule, inputs, x, k)[first:]
    row = schedule.coefficients(k, eta is None, eta if schedule.ddim else None)
    ours = posterior_mean(eps, x, row, policy.clips.x0, policy.clips.eps)
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    if not worst <= TOLERANCE:
        raise UserError(
            f"accelerate: the denoising steps of {type(model).__name__} differ from what its classes' names promise by "
            f"{worst:.2g} of their means; it has a network, schedule or p_mean_var of its own"
        )


def _linears(module: nn.Module | None) -> list[nn.Linear]:
    return [] if module is None else [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _activation(module: nn.Module) -> str:
    """The name of the first activation inside."""
    plain = (layer for layer in module.modules() if not [*layer.children(), *layer.parameters()])
    first = next(layer for layer in plain if not isinstance(layer, nn.Dropout))
    return _choose(ACTIVATIONS, first, "activation").__name__


def _mlp(network: Any, action_size: int) -> dict[str, Any]:
    """The arguments of our DiffusionMLP but for the action's."""
    trunk, vision = network.mlp_mean, _vision(network)
    residual = hasattr(trunk, "layers")
    cond_mlp = _linears(getattr(network, "cond_mlp", None))
    time_dim = network.time_embedding[1].in_features
    first, *rest = _linears(trunk)
    seen = first.in_features - action_size - time_dim - vision.pop("visual_dim", 0)
    return {
        "cond_dim": cond_mlp[0].in_features if cond_mlp else seen,
        "time_dim": time_dim,
        "mlp_dims": [layer.in_features for layer in rest],
        "cond_mlp_dims": [layer.out_features for layer in cond_mlp] or None,
        "activation_type": _activation(trunk),
        "out_activation_type": type(trunk.layers[-1] if residual else trunk.moduleList[-1].act_1).__name__,
        "use_layernorm": any(isinstance(layer, nn.LayerNorm) for layer in trunk.modules()),
        "residual_style": residual,
        **vision,
    }


def _unet(network: Any, action_size: int) -> dict[str, Any]:
    """The arguments of our Unet1D but for the action's."""
    block, vision = network.mid_modules[0], _vision(network)
    conv, _, norm, *_, act = block.blocks[0].block
    cond_mlp = _linears(getattr(network, "cond_mlp", None))
    encoder, time_dim = _linears(block.cond_encoder), network.time_mlp[1].in_features
    widths = [level[0].blocks[0].block[0].out_channels for level in network.down_modules]
    seen = encoder[0].in_features - time_dim - vision.pop("visual_dim", 0)
    return {
        "cond_dim": cond_mlp[0].in_features if cond_mlp else seen,
        "diffusion_step_embed_dim": time_dim,
        "dim": widths[0],
        "dim_mults": [width // widths[0] for width in widths],
        "smaller_encoder": len(encoder) == 1,
        "cond_mlp_dims": [layer.out_features for layer in cond_mlp] or None,
        "kernel_size": conv.kernel_size[0],
        "n_groups": getattr(norm, "num_groups", None),
        "activation_type": type(act).__name__,
        "cond_predict_scale": block.cond_predict_scale,
        "groupnorm_eps": getattr(norm, "eps", 1e-5),
        **vision,
    }


def _vision(network: Any) -> dict[str, Any]:
    """What a network that sees images takes more, and ``visual_dim``, the size of what it makes of them."""
    if not hasattr(network, "backbone"):
        return {}
    backbone, vit = network.backbone, network.backbone.vit
    conv = next(layer for layer in vit.patch_embed.modules() if isinstance(layer, nn.Conv2d))
    compress = network.compress1 if network.num_img > 1 else network.compress
    spatial_emb = compress.weight.shape[-1] if hasattr(compress, "weight") else 0
    visual_feature_dim = spatial_emb or compress[0].out_features
    channels = network.num_img * conv.in_channels // network.img_cond_steps
    return {
        "image_shapes": {"rgb": (network.img_cond_steps, channels, backbone.img_h, backbone.img_w)},
        "backbone": VitConfig(
            patch_size=conv.kernel_size[0],
            depth=len(vit.net),
            embed_dim=conv.out_channels,
            num_heads=vit.net[0].mha.num_head,
            embed_style="embed1" if hasattr(vit.patch_embed, "conv") else "embed2",
            embed_norm=any(isinstance(layer, nn.GroupNorm) for layer in vit.patch_embed.modules()),
        ),
        "img_cond_steps": network.img_cond_steps,
        "num_img": network.num_img,
        "spatial_emb": spatial_emb,
        "visual_feature_dim": visual_feature_dim,
        "visual_dim": network.num_img * visual_feature_dim,
    }


NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[[Any, int], dict[str, Any]]]] = {
    "DiffusionMLP": (DiffusionMLP, _mlp),
    "VisionDiffusionMLP": (VisionDiffusionMLP, _mlp),
    "Unet1D": (Unet1D, _unet),
    "VisionUnet1D": (VisionUnet1D, _unet),
}
"""Their networks -> ours, and what tells ours' arguments from a live one and the size of its action chunk."""


def _eta_mlp(eta: Any) -> dict[str, Any]:
    """The arguments of our EtaState."""
    first, *rest = _linears(eta.mlp_res)
    return {
        "input_dim": first.in_features,
        "mlp_dims": [layer.in_features for layer in rest],
        "activation_type": _activation(eta.mlp_res),
        "base_eta": eta.base,
        "min_eta": eta.min_res + eta.base,
        "max_eta": eta.max_res + eta.base,
    }


def _eta_fixed(eta: Any) -> EtaFixed:
    base = 0.5 * (math.tanh(eta.eta_logit.item()) + 1) * (eta.max - eta.min) + eta.min
    return EtaFixed(base, eta.min, eta.max)


ETAS: dict[str, Callable[[Any], Eta]] = {
    "EtaFixed": _eta_fixed,
    "EtaAction": lambda eta: EtaAction(len(eta.eta_logit), (eta.min + eta.max) / 2, eta.min, eta.max),
    "EtaState": lambda eta: EtaState(**_eta_mlp(eta)),
    "EtaStateAction": lambda eta: EtaStateAction(action_dim=_linears(eta.mlp_res)[-1].out_features, **_eta_mlp(eta)),
}
"""Their etas -> ours."""
