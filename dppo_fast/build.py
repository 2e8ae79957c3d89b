"""The composition root: from a configuration to environments, policy, algorithm and trainer. It alone knows all
classes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn

from dppo_fast.algorithms import ALGORITHMS
from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.algorithms.off_policy import Explorer, OffPolicy
from dppo_fast.algorithms.parts import Parts
from dppo_fast.checkpoint import CheckpointError, PolicyWeights, load_policy_weights, load_weights
from dppo_fast.config import choose, construct, naming, resolve_path, typed
from dppo_fast.data.trajectories import ChunkDataset, Trajectories
from dppo_fast.envs import EnvConfig, make_env, normalization_of
from dppo_fast.envs.normalize import Normalization, normalization_from_state
from dppo_fast.evaluator import Evaluator
from dppo_fast.networks.critic import CriticObs, CriticObsAct
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.gmm import GMMMLP
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.networks.transformer import GaussianTransformer, GMMTransformer
from dppo_fast.networks.unet1d import Unet1D
from dppo_fast.networks.vision import (
    Vision,
    VisionDiffusionMLP,
    VisionGaussianMLP,
    VisionGMMMLP,
    VisionUnet1D,
    ViTCritic,
)
from dppo_fast.policies.base import Policy
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import DensityPolicy, GaussianConfig, GaussianPolicy
from dppo_fast.policies.gmm import GMMPolicy
from dppo_fast.policies.probability_flow import FlowPolicy, FlowPolicyConfig
from dppo_fast.policies.squashed import SquashedGaussianPolicy
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.runtime.gl import headless_gl
from dppo_fast.runtime.graph import use_graphs
from dppo_fast.runtime.memory import describe_memory
from dppo_fast.runtime.precision import pick_recipe
from dppo_fast.trainer import TrainConfig, Trainer
from dppo_fast.types import Actor, NoiseStream, ObsShapes, UserError, VecEnv, require_ranges
from dppo_fast.video import Filmed

DENOISING: dict[str, type[nn.Module]] = {
    "diffusion_mlp": DiffusionMLP,
    "diffusion_vision_mlp": VisionDiffusionMLP,
    "diffusion_vision_unet": VisionUnet1D,
    "unet1d": Unet1D,
}
GAUSSIANS: dict[str, type[nn.Module]] = {
    "gaussian_mlp": GaussianMLP,
    "gaussian_transformer": GaussianTransformer,
    "gaussian_vision_mlp": VisionGaussianMLP,
}
MIXTURES: dict[str, type[nn.Module]] = {
    "gmm_mlp": GMMMLP,
    "gmm_transformer": GMMTransformer,
    "gmm_vision_mlp": VisionGMMMLP,
}
NETWORKS = {**DENOISING, **GAUSSIANS, **MIXTURES}
CRITICS: dict[str, type[nn.Module]] = {"mlp": CriticObs, "vit": ViTCritic}
ACTION_CRITICS: dict[str, type[nn.Module]] = {"mlp": CriticObsAct}
ETAS: dict[str, type[Eta]] = {
    "fixed": EtaFixed,
    "action": EtaAction,
    "state": EtaState,
    "state_action": EtaStateAction,
}

EVALUATION_SEED_OFFSET = 1_000_003
"""Evaluation environments and noise are seeded apart from the training's."""


@dataclass
class TaskConfig:
    """What is shared by training and evaluation: chunk lengths and what counts as success.

    A policy sees the states of the last ``cond_steps`` steps, and where it sees images those of ``img_cond_steps``.
    """

    horizon_steps: int = 4
    act_steps: int = 4
    cond_steps: int = 1
    img_cond_steps: int = 1
    best_reward_threshold_for_success: float = math.inf
    sparse_reward: bool = False

    def __post_init__(self) -> None:
        steps = ("horizon_steps", "act_steps", "cond_steps", "img_cond_steps")
        require_ranges(self, "task", dict.fromkeys(steps, "[1, inf)"))
        if self.act_steps > self.horizon_steps:
            raise UserError(
                f"task.act_steps={self.act_steps} is longer than task.horizon_steps={self.horizon_steps}, the chunk "
                "that the policy predicts; it must be at most that"
            )


@dataclass
class PolicyNode:
    """``checkpoint``: the base policy's file or run directory, null to start from random weights."""

    name: str = MISSING
    checkpoint: str | None = None
    network: dict[str, Any] = MISSING
    eta: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataNode:
    """``folder`` is only referred to by other keys: where demonstrations and their normalisation lie together."""

    folder: str | None = None
    path: str | None = None
    max_n_episodes: int | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "data", {"max_n_episodes": "[1, inf)"})


@dataclass
class RenderConfig:
    """Videos under the run's ``videos``: whole episodes of the envs numbered ``train``, one each in every
    ``train.val_freq`` iterations, and the first of those numbered ``evaluate`` in every evaluation.
    """

    train: list[int] = field(default_factory=list)
    evaluate: list[int] = field(default_factory=list)
    fps: int = 20

    def __post_init__(self) -> None:
        require_ranges(self, "render", {"fps": "[1, inf)"})


@dataclass
class LogConfig:
    """``live=None`` asks the terminal; ``wandb`` holds arguments of ``wandb.init``, whose ``entity`` is by default
    DPPO_WANDB_ENTITY.
    """

    live: bool | None = None
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.wandb is not None and (entity := os.environ.get("DPPO_WANDB_ENTITY")):
            self.wandb = {"entity": entity, **self.wandb}


@dataclass
class RunConfig:
    """The top level of every configuration. Without an ``algorithm`` there is only a policy to evaluate.

    ``profile`` is nvtx, torch or None; with torch the ``profile_iterations`` are traced.
    """

    seed: int = 42
    device: str = "auto"
    logdir: str = MISSING
    dry_run: bool = False
    resume: str | None = None
    resume_from: str = "latest"
    compat: str | None = None
    num_threads: int = 0
    graphs: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    profile: str | None = None
    profile_iterations: list[int] = field(default_factory=lambda: [2])
    task: TaskConfig = field(default_factory=TaskConfig)
    env: dict[str, Any] | None = None
    policy: PolicyNode = field(default_factory=PolicyNode)
    critic: dict[str, Any] | None = None
    algorithm: dict[str, Any] = MISSING
    data: DataNode = field(default_factory=DataNode)
    train: TrainConfig = field(default_factory=TrainConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require_ranges(self, "", {"seed": "[0, 4294967295]", "num_threads": "[0, inf)"})
        if self.compat not in (None, "reference"):
            raise UserError(f"compat={self.compat} is unknown; choose reference, or null for none")
        if self.resume_from not in ("latest", "previous"):
            raise UserError(f"resume_from={self.resume_from} is unknown; choose latest or previous")
        if self.algorithm:
            choose(ALGORITHMS, self.algorithm.get("name"), "algorithm.name")


def parse(node: Any) -> RunConfig:
    """The typed configuration. Raises UserError for every mistake that shows without building anything."""
    return typed(RunConfig, node, "")


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. ``cuda:<index>`` becomes PyTorch's current device, on which kernels and
    graphs run. Raises UserError for a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is unknown; choose auto, cpu, cuda or cuda:<index>") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not supported; choose auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; choose auto or cpu")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def build_network(
    node: PolicyNode, fitting: Mapping[str, type[nn.Module]], obs_shapes: ObsShapes, action_dim: int, horizon_steps: int
) -> nn.Module:
    """One of the ``fitting`` networks with random weights."""
    arguments = dict(node.network)
    name = arguments.pop("name", None)
    cls = choose(NETWORKS, name, "policy.network.name")
    if name not in fitting:
        raise UserError(
            f"policy.network.name={name} does not fit policy.name={node.name}; choose one of {', '.join(fitting)}"
        )
    dims = {"action_dim": action_dim, "horizon_steps": horizon_steps, **_seen(cls, obs_shapes)}
    return construct(cls, arguments, "policy.network", **dims)


def _seen(cls: type[nn.Module], obs_shapes: ObsShapes) -> dict[str, Any]:
    """What a network has to know of the observations."""
    dims: dict[str, Any] = {"cond_dim": math.prod(obs_shapes["state"])}
    if issubclass(cls, Vision):
        dims["image_shapes"] = {name: shape for name, shape in obs_shapes.items() if name != "state"}
    return dims


def build_diffusion(
    schema: type[DiffusionConfig],
    make: Callable[..., DiffusionPolicy],
    config: RunConfig,
    network: nn.Module,
    obs_shapes: ObsShapes,
    action_dim: int,
) -> DiffusionPolicy:
    options = {"reward_horizon": config.task.act_steps, **config.policy.options}
    chain = typed(schema, options, "policy.options")
    eta = None
    if config.policy.eta is not None:
        arguments = dict(config.policy.eta)
        cls = choose(ETAS, arguments.pop("name", None), "policy.eta.name")
        dims = {"action_dim": action_dim} if cls in (EtaAction, EtaStateAction) else {}
        if cls in (EtaState, EtaStateAction):
            dims["input_dim"] = math.prod(obs_shapes["state"])
        eta = construct(cls, arguments, "policy.eta", **dims)
    with naming("policy.options"):
        return make(network, chain, config.task.horizon_steps, action_dim, eta)


def build_flow(config: RunConfig, *parts: Any) -> DiffusionPolicy:
    make = partial(FlowPolicy, reference=config.compat == "reference")
    return build_diffusion(FlowPolicyConfig, make, config, *parts)


def build_density(
    cls: type[DensityPolicy], config: RunConfig, network: nn.Module, obs_shapes: ObsShapes, action_dim: int
) -> DensityPolicy:
    options = typed(GaussianConfig, config.policy.options, "policy.options")
    return cls(network, options, config.task.horizon_steps, action_dim, clamp_log_prob=config.compat == "reference")


POLICIES: dict[str, tuple[Callable[[RunConfig, nn.Module, ObsShapes, int], Policy], Mapping[str, type[nn.Module]]]] = {
    "diffusion": (partial(build_diffusion, DiffusionConfig, DiffusionPolicy), DENOISING),
    "flow": (build_flow, DENOISING),
    "gaussian": (partial(build_density, GaussianPolicy), GAUSSIANS),
    "gmm": (partial(build_density, GMMPolicy), MIXTURES),
    "squashed_gaussian": (partial(build_density, SquashedGaussianPolicy), GAUSSIANS),
}
"""Name -> how the policy is made, and of which networks."""


def build_policy(config: RunConfig, obs_shapes: ObsShapes, action_dim: int, seed: int) -> Policy:
    """A policy with random weights that follow from ``seed``."""
    make, networks = choose(POLICIES, config.policy.name, "policy.name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config.policy, networks, obs_shapes, action_dim, config.task.horizon_steps)
        return make(config, network, obs_shapes, action_dim)


def start_policy(config: RunConfig, obs_shapes: ObsShapes, action_dim: int, device: torch.device) -> Policy:
    """The policy that training starts from: ``policy.checkpoint``, or random weights."""
    policy = build_policy(config, obs_shapes, action_dim, config.seed).to(device)
    if config.policy.checkpoint is not None:
        with naming("policy.checkpoint"):
            weights = load_policy_weights(resolve_path(config.policy.checkpoint))
            weights.require_dims(obs_shapes, action_dim)
            load_base(policy, weights)
        print(f"policy.checkpoint: {weights.describe()}")
    return policy


def load_base(policy: Policy, weights: PolicyWeights) -> None:
    """Start from a pre-trained policy: both networks take its base weights."""
    if weights.actor_ft is not None and isinstance(policy, DiffusionPolicy):
        raise CheckpointError(
            f"{weights.source} is fine-tuned already; give a pre-trained one, or continue its run with "
            "resume=<run directory>"
        )
    trained = weights.actor if isinstance(policy, DiffusionPolicy) else weights.actor_ft or weights.actor
    for network in (policy.actor, policy.actor_ft):
        if network is not None:
            # fine-tuning may learn a std that pre-training had fixed
            start = {name: value for name, value in network.state_dict().items() if name == "logvar"}
            load_weights(network, {**start, **trained}, weights.source)


def load_trained(policy: Policy, weights: PolicyWeights) -> None:
    """Take over a policy as it was saved, fine-tuned network and eta included."""
    load_weights(policy.actor, weights.actor, weights.source)
    if policy.actor_ft is not None:
        load_weights(policy.actor_ft, weights.actor_ft or weights.actor, weights.source)
    if isinstance(policy, DiffusionPolicy):
        if policy.eta is not None and weights.eta is not None:
            load_weights(policy.eta, weights.eta, weights.source)
        if weights.interface is not None:
            policy.ft_steps = int(weights.interface["ft_steps"])
            policy.min_sampling_std = float(weights.interface.get("min_sampling_std", policy.min_sampling_std))


def env_config(config: RunConfig, num_envs: int | None = None, normalized: bool = False) -> EnvConfig:
    """The environment's configuration, chunk lengths taken from the task. Where the caller has its normalisation
    (``normalized``), the file that it was read from is not looked for.
    """
    if config.env is None:
        raise UserError("env is missing: this configuration has no environment")
    task = config.task
    node = {
        **config.env,
        "act_steps": task.act_steps,
        "obs_steps": task.cond_steps,
        "image_steps": task.img_cond_steps,
    }
    if num_envs is not None:
        node |= {"num_envs": num_envs, "groups": 1}
    if config.compat == "reference":
        node["time_limit_terminates"] = True
    result = typed(EnvConfig, node, "env")
    if normalized:
        return result
    with naming("env.normalization"):
        return replace(result, normalization=resolve_path(result.normalization))


def build_trainer(config: RunConfig, run: Path, run_config: Mapping[str, Any] | None = None) -> Trainer:
    """Everything that ``config`` describes, ready to train from the start or to be restored."""
    device = pick_device(config.device)
    if config.num_threads > 0:
        torch.set_num_threads(config.num_threads)
    if config.render.train or config.render.evaluate:
        headless_gl()  # before a simulator is imported
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    build = _build_offline if config.algorithm["name"] == "bc" else _build_online
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    return build(config, run, device, generator, run_config)


def _build_offline(
    config: RunConfig, run: Path, device: torch.device, generator: torch.Generator, run_config: Mapping[str, Any] | None
) -> Trainer:
    bc = typed(BCConfig, _options(config.algorithm), "algorithm")
    trajectories, path, task = _trajectories(config), str(config.data.path), config.task
    with naming("task"):
        vision = issubclass(choose(NETWORKS, config.policy.network.get("name"), "policy.network.name"), Vision)
        dataset = ChunkDataset(
            trajectories,
            task.horizon_steps,
            task.cond_steps,
            device,
            task.img_cond_steps if vision else None,
        )
    if bc.batch_size > len(dataset):
        raise UserError(f"algorithm.batch_size={bc.batch_size} is larger than the {len(dataset)} windows of {path}")
    policy = start_policy(config, dataset.obs_shapes, dataset.action_dim, device)
    if isinstance(policy, DiffusionPolicy) and policy.ft_steps:
        raise UserError(f"policy.options.ft_denoising_steps={policy.ft_steps} is for fine-tuning; pre-training needs 0")
    algorithm = BehaviourCloning(policy, bc, dataset)
    with torch.random.fork_rng(devices=[]):
        introduction = describe_memory(algorithm.memory())
    policy.generator = algorithm.generator = generator
    trainer: Trainer
    evaluator = normalization = None
    if config.env is not None:
        env = make_env(env_config(config, num_envs=1), device, config.seed)
        env.close()
        _require_same_dims(path, dataset.obs_shapes, dataset.action_dim, env)
        normalization = normalization_of(env)
        if config.train.val_freq:
            evaluator = _evaluator(config, device, normalization, run, lambda: trainer.iteration)
    interface = interface_of(policy, dataset.obs_shapes, normalization)
    trainer = Trainer(algorithm, config.train, run, generator, None, evaluator, interface, run_config, introduction)
    return trainer


def _build_online(
    config: RunConfig, run: Path, device: torch.device, generator: torch.Generator, run_config: Mapping[str, Any] | None
) -> Trainer:
    name, task, train = config.algorithm["name"], config.task, config.train
    cls, schema = ALGORITHMS[name]
    assert issubclass(cls, OnlineAlgorithm)
    options: Any = typed(schema, _options(config.algorithm), "algorithm")
    reference = config.compat == "reference"
    if reference:
        train = replace(train, evaluate_in_place=True)
    env = make_env(env_config(config), device, config.seed)
    normalization = normalization_of(env)
    policy = start_policy(config, env.obs_shapes, env.action_dim, device)
    if not isinstance(policy, cls.trains):
        raise UserError(
            f"algorithm.name={name} does not fit policy.name={config.policy.name}: it trains a {cls.trains.__name__}, "
            f"not a {type(policy).__name__}"
        )
    parts = _parts(config, env, policy, device, generator)
    if isinstance(policy, DiffusionPolicy):
        policy.sampler.enabled, policy.recipe = parts.graphs, parts.recipe
    algorithm = cls.build(options, parts)
    introduction = describe_memory(algorithm.memory(env.obs_shapes))
    policy.generator, policy.noise = generator, NoiseStream(config.seed)
    statistics = EpisodeStatistics(
        env.num_envs, env.act_steps, task.best_reward_threshold_for_success, task.sparse_reward, whole_only=reference
    )
    trainer: Trainer
    if config.render.train:

        def label() -> str | None:
            due = trainer.iteration % max(train.val_freq, 1) == 0
            return f"train_{trainer.iteration:06d}" if due else None

        env = Filmed(env, config.render.train, run / "videos", label, config.render.fps)
    collector = Collector(env, algorithm.actor, statistics)
    evaluator = None
    if train.val_freq and not reference:
        evaluator = _evaluator(config, device, normalization, run, lambda: trainer.iteration)
    interface = interface_of(policy, env.obs_shapes, normalization, algorithm.judges)
    trainer = Trainer(algorithm, train, run, generator, collector, evaluator, interface, run_config, introduction)
    return trainer


@dataclass
class Dims:
    """What a task tells without its environments."""

    obs_shapes: ObsShapes
    action_dim: int
    num_envs: int = 1


def _parts(
    config: RunConfig, env: VecEnv | Dims, policy: Policy, device: torch.device, generator: torch.Generator
) -> Parts:
    """What the configuration gives the algorithm."""
    seeds, task = itertools.count(config.seed + 1), config.task

    def critic(registry: Mapping[str, type[nn.Module]], dims: Mapping[str, int], **first: Any) -> nn.Module:
        arguments = {**(config.critic or {}), **first}
        cls = choose(registry, arguments.pop("name", "mlp"), "critic.name")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(next(seeds))
            return construct(cls, arguments, "critic", **_seen(cls, env.obs_shapes), **dims).to(device)

    def trajectories() -> Trajectories:
        found = _trajectories(config)
        obs_shapes = {"state": (task.cond_steps, found.state_dim)}
        _require_same_dims(str(config.data.path), obs_shapes, found.action_dim, env)
        return found

    return Parts(
        policy,
        partial(critic, CRITICS, {}),
        partial(critic, ACTION_CRITICS, {"action_dim": env.action_dim, "action_steps": task.act_steps}),
        trajectories,
        env.num_envs,
        config.train.n_steps,
        task.act_steps,
        task.cond_steps,
        device,
        generator,
        use_graphs(config.graphs, device),
        pick_recipe(config.precision, device),
        config.compat == "reference",
        config.policy.checkpoint is not None,
    )


def _trajectories(config: RunConfig) -> Trajectories:
    """The demonstrations that the configuration names."""
    if config.data.path is None:
        raise UserError("data.path is missing: give the demonstrations' npz file")
    with naming("data.path"):
        return Trajectories.load(resolve_path(config.data.path)).first(config.data.max_n_episodes)


def _evaluator(
    config: RunConfig,
    device: torch.device,
    normalization: Normalization | None,
    run: Path,
    iteration: Callable[[], int],
) -> Evaluator:
    settings = env_config(config, config.train.eval_episodes)
    seed = config.seed + EVALUATION_SEED_OFFSET
    task, render = config.task, config.render

    def make() -> VecEnv:
        env = make_env(settings, device, seed, normalization, training=False)
        if not render.evaluate:
            return env
        return Filmed(env, render.evaluate, run / "videos", lambda: f"evaluate_{iteration():06d}", render.fps)

    return Evaluator(
        make,
        seed,
        task.best_reward_threshold_for_success,
        task.sparse_reward,
    )


def _require_same_dims(path: str, obs_shapes: ObsShapes, action_dim: int, env: VecEnv | Dims) -> None:
    seen = {name: shape for name, shape in env.obs_shapes.items() if name in obs_shapes}
    data, simulated = (dict(obs_shapes), action_dim), (seen, env.action_dim)
    if data != simulated:
        raise UserError(
            f"data.path={path} has observations {data[0]} and {data[1]} action dims, the environment "
            f"{simulated[0]} and {simulated[1]}"
        )


def _options(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "name"}


def interface_of(
    policy: Policy, obs_shapes: ObsShapes, normalization: Normalization | None, judges: Sequence[str] = ()
) -> Callable[[], Mapping[str, Any]]:
    """What a checkpoint tells, as ``interface``, to those who only use its policy, and the ``judges`` of what it
    proposes.
    """

    def interface() -> dict[str, Any]:
        chain: dict[str, Any] = {"ft_steps": policy.decisions}
        if isinstance(policy, DiffusionPolicy):
            chain = {"ft_steps": policy.ft_steps, "min_sampling_std": policy.min_sampling_std}
        return {
            "obs_shapes": dict(obs_shapes),
            "action_dim": policy.action_dim,
            **chain,
            "normalization": None if normalization is None else normalization.state_dict(),
            "judges": list(judges),
        }

    return interface


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy from a checkpoint, and what it takes to run it in its environment. ``actor`` decides as in training: it
    is the policy, or has critics choose among what that proposes.
    """

    policy: Policy
    actor: Actor
    config: RunConfig
    normalization: Normalization | None
    obs_shapes: ObsShapes
    source: str

    def make_env(self, num_envs: int, device: torch.device, seed: int, act_steps: int | None = None) -> VecEnv:
        settings = env_config(self.config, num_envs, normalized=self.normalization is not None)
        if act_steps is not None:
            settings = replace(settings, act_steps=act_steps)
        return make_env(settings, device, seed, self.normalization, training=False)


def load_policy(path: str | Path, device: torch.device) -> LoadedPolicy:
    """The policy of one of our checkpoints, or of a run directory's latest, with nothing but the file."""
    weights = load_policy_weights(path)
    if weights.interface is None:
        raise UserError(f"{path}: a checkpoint of the reference holds no configuration; pass it as policy.checkpoint")
    return policy_of(weights, device)


def policy_of(weights: PolicyWeights, device: torch.device) -> LoadedPolicy:
    """The policy that the weights of one of our checkpoints are of."""
    interface = weights.interface
    assert interface is not None
    config = parse(weights.config)
    obs_shapes = {name: tuple(shape) for name, shape in interface["obs_shapes"].items()}
    policy = build_policy(config, obs_shapes, interface["action_dim"], config.seed).to(device)
    load_trained(policy, weights)
    actor = _judged(config, policy, weights, obs_shapes, device) if weights.judges else policy
    saved = interface["normalization"]
    normalization = None if saved is None else normalization_from_state(saved)
    return LoadedPolicy(policy, actor, config, normalization, obs_shapes, weights.source)


def _judged(
    config: RunConfig, policy: Policy, weights: PolicyWeights, obs_shapes: ObsShapes, device: torch.device
) -> Actor:
    """The algorithm's way to decide, with the critics of the checkpoint; how they were trained is of no account."""
    config = replace(config, graphs="off", precision="fp32")
    cls, schema = ALGORITHMS[config.algorithm["name"]]
    assert issubclass(cls, OffPolicy)
    options: Any = typed(schema, _options(config.algorithm), "algorithm")
    parts = _parts(config, Dims(obs_shapes, policy.action_dim), policy, device, torch.Generator(device))
    algorithm = cls(options, parts)
    for name, own in weights.judges.items():
        load_weights(algorithm.networks[name], own, weights.source)
    return Explorer(policy, 0, algorithm.decide)
