"""The composition root: from a configuration to environments, policy, algorithm and trainer. It alone knows all
classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn

from dppo_fast.algorithms import ALGORITHMS
from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.algorithms.dppo import DPPO
from dppo_fast.algorithms.ppo import PPO, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.checkpoint import CheckpointError, PolicyWeights, load_policy_weights, load_weights
from dppo_fast.config import choose, construct, naming, resolve_path, typed
from dppo_fast.data.trajectories import ChunkDataset, Trajectories
from dppo_fast.envs import ChunkEnv, EnvConfig, make_env
from dppo_fast.envs.normalize import Normalization, normalization_from_state
from dppo_fast.evaluator import Evaluator
from dppo_fast.networks.critic import CriticObs
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.policies.base import Policy
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.runtime.graph import use_graphs
from dppo_fast.runtime.precision import pick_recipe
from dppo_fast.trainer import TrainConfig, Trainer
from dppo_fast.types import NoiseStream, ObsShapes, UserError, require_ranges

NETWORKS: dict[str, type[nn.Module]] = {"diffusion_mlp": DiffusionMLP, "gaussian_mlp": GaussianMLP}
CRITICS: dict[str, type[nn.Module]] = {"mlp": CriticObs}
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
    """What is shared by training and evaluation: chunk lengths and what counts as success."""

    horizon_steps: int = 4
    act_steps: int = 4
    cond_steps: int = 1
    best_reward_threshold_for_success: float = math.inf
    sparse_reward: bool = False

    def __post_init__(self) -> None:
        require_ranges(self, "task", dict.fromkeys(("horizon_steps", "act_steps", "cond_steps"), "[1, inf)"))
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
    path: str | None = None
    max_n_episodes: int | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "data", {"max_n_episodes": "[1, inf)"})


@dataclass
class LogConfig:
    """``live=None`` asks the terminal; ``wandb`` holds arguments of ``wandb.init``."""

    live: bool | None = None
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None


@dataclass
class RunConfig:
    """The top level of every configuration.

    ``profile`` is nvtx, torch or None; with torch the ``profile_iterations`` are traced.
    """

    seed: int = 42
    device: str = "auto"
    logdir: str = MISSING
    resume: str | None = None
    resume_from: str = "latest"
    compat: str | None = None
    num_threads: int = 0
    graphs: str = "auto"
    precision: str = "auto"
    profile: str | None = None
    profile_iterations: list[int] = field(default_factory=lambda: [2])
    task: TaskConfig = field(default_factory=TaskConfig)
    env: dict[str, Any] | None = None
    policy: PolicyNode = field(default_factory=PolicyNode)
    critic: dict[str, Any] | None = None
    algorithm: dict[str, Any] = MISSING
    data: DataNode = field(default_factory=DataNode)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require_ranges(self, "", {"seed": "[0, 4294967295]", "num_threads": "[0, inf)"})
        if self.compat not in (None, "reference"):
            raise UserError(f"compat={self.compat} is unknown; choose reference, or null for none")
        if self.resume_from not in ("latest", "previous"):
            raise UserError(f"resume_from={self.resume_from} is unknown; choose latest or previous")
        choose(ALGORITHMS, self.algorithm.get("name"), "algorithm.name")


def parse(node: Any) -> RunConfig:
    """The typed configuration. Raises UserError for every mistake that shows without building anything."""
    return typed(RunConfig, node, "")


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises UserError for a device that this machine lacks."""
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
    return device


def build_network(network: Mapping[str, Any], obs_shapes: ObsShapes, action_dim: int, horizon_steps: int) -> nn.Module:
    arguments = dict(network)
    cls = choose(NETWORKS, arguments.pop("name", None), "policy.network.name")
    cond_dim = math.prod(obs_shapes["state"])
    return construct(
        cls, arguments, "policy.network", action_dim=action_dim, horizon_steps=horizon_steps, cond_dim=cond_dim
    )


def build_diffusion(config: RunConfig, network: nn.Module, obs_shapes: ObsShapes, action_dim: int) -> DiffusionPolicy:
    options = {"reward_horizon": config.task.act_steps, **config.policy.options}
    chain = typed(DiffusionConfig, options, "policy.options")
    eta = None
    if config.policy.eta is not None:
        arguments = dict(config.policy.eta)
        cls = choose(ETAS, arguments.pop("name", None), "policy.eta.name")
        dims = {"action_dim": action_dim} if cls in (EtaAction, EtaStateAction) else {}
        if cls in (EtaState, EtaStateAction):
            dims["input_dim"] = math.prod(obs_shapes["state"])
        eta = construct(cls, arguments, "policy.eta", **dims)
    with naming("policy.options"):
        return DiffusionPolicy(network, chain, config.task.horizon_steps, action_dim, eta)


def build_gaussian(config: RunConfig, network: nn.Module, obs_shapes: ObsShapes, action_dim: int) -> GaussianPolicy:
    options = typed(GaussianConfig, config.policy.options, "policy.options")
    return GaussianPolicy(network, options, config.task.horizon_steps, action_dim)


POLICIES: dict[str, Callable[[RunConfig, nn.Module, ObsShapes, int], Policy]] = {
    "diffusion": build_diffusion,
    "gaussian": build_gaussian,
}


def build_policy(config: RunConfig, obs_shapes: ObsShapes, action_dim: int, seed: int) -> Policy:
    """A policy with random weights that follow from ``seed``."""
    make = choose(POLICIES, config.policy.name, "policy.name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config.policy.network, obs_shapes, action_dim, config.task.horizon_steps)
        return make(config, network, obs_shapes, action_dim)


def start_policy(config: RunConfig, obs_shapes: ObsShapes, action_dim: int, device: torch.device) -> Policy:
    """The policy that training starts from: ``policy.checkpoint``, or random weights."""
    policy = build_policy(config, obs_shapes, action_dim, config.seed).to(device)
    if config.policy.checkpoint is not None:
        with naming("policy.checkpoint"):
            load_base(policy, load_policy_weights(resolve_path(config.policy.checkpoint)))
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
            load_weights(network, trained, weights.source)


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


def env_config(config: RunConfig, num_envs: int | None = None) -> EnvConfig:
    """The environment's configuration, chunk lengths taken from the task."""
    if config.env is None:
        raise UserError("env is missing: this configuration has no environment")
    node = {**config.env, "act_steps": config.task.act_steps, "obs_steps": config.task.cond_steps}
    if num_envs is not None:
        node["num_envs"] = num_envs
    if config.compat == "reference":
        node["time_limit_terminates"] = True
    result = typed(EnvConfig, node, "env")
    with naming("env.normalization"):
        return replace(result, normalization=resolve_path(result.normalization))


def build_trainer(config: RunConfig, run: Path, run_config: Mapping[str, Any] | None = None) -> Trainer:
    """Everything that ``config`` describes, ready to train from the start or to be restored."""
    device = pick_device(config.device)
    if config.num_threads > 0:
        torch.set_num_threads(config.num_threads)
    build = _build_offline if config.algorithm["name"] == "bc" else _build_online
    generator = torch.Generator(device).manual_seed(config.seed)
    return build(config, run, device, generator, run_config)


def _build_offline(
    config: RunConfig, run: Path, device: torch.device, generator: torch.Generator, run_config: Mapping[str, Any] | None
) -> Trainer:
    bc = typed(BCConfig, _options(config.algorithm), "algorithm")
    if config.data.path is None:
        raise UserError("data.path is missing: give the demonstrations' npz file")
    with naming("data.path"):
        path = resolve_path(config.data.path)
        trajectories = Trajectories.load(path)
    task = config.task
    with naming("task"):
        dataset = ChunkDataset(trajectories, task.horizon_steps, task.cond_steps, config.data.max_n_episodes, device)
    if bc.batch_size > len(dataset):
        raise UserError(f"algorithm.batch_size={bc.batch_size} is larger than the {len(dataset)} windows of {path}")
    policy = start_policy(config, dataset.obs_shapes, dataset.action_dim, device)
    if isinstance(policy, DiffusionPolicy) and policy.ft_steps:
        raise UserError(f"policy.options.ft_denoising_steps={policy.ft_steps} is for fine-tuning; pre-training needs 0")
    policy.generator = generator
    algorithm = BehaviourCloning(policy, bc, dataset)
    algorithm.generator = generator
    evaluator = normalization = None
    if config.env is not None:
        env = make_env(env_config(config, num_envs=1), device, config.seed)
        env.close()
        _require_same_dims(path, dataset.obs_shapes, dataset.action_dim, env)
        normalization = env.normalization
        if config.train.val_freq:
            evaluator = _evaluator(config, device, normalization)
    interface = _interface(policy, dataset.obs_shapes, normalization)
    return Trainer(algorithm, config.train, run, generator, None, evaluator, interface, run_config)


def _build_online(
    config: RunConfig, run: Path, device: torch.device, generator: torch.Generator, run_config: Mapping[str, Any] | None
) -> Trainer:
    cls, schema = ALGORITHMS[config.algorithm["name"]]
    assert issubclass(cls, PPO)
    options: PPOConfig = typed(schema, _options(config.algorithm), "algorithm")
    reference = config.compat == "reference"
    train = config.train
    if reference:
        train = TrainConfig(**{**vars(train), "evaluate_in_place": True})
    env = make_env(env_config(config), device, config.seed)
    policy = start_policy(config, env.obs_shapes, env.action_dim, device)
    if issubclass(cls, DPPO) != isinstance(policy, DiffusionPolicy):
        raise UserError(
            f"algorithm.name={config.algorithm['name']} does not fit policy.name={config.policy.name}: dppo trains "
            "diffusion policies, ppo the others"
        )
    if policy.decisions < 1:
        raise UserError("policy.options.ft_denoising_steps=0: fine-tuning needs at least 1")
    pairs = train.n_steps * env.num_envs * policy.decisions
    if options.batch_size > pairs:
        raise UserError(
            f"algorithm.batch_size={options.batch_size} is larger than the {pairs} pairs of one iteration "
            f"(train.n_steps={train.n_steps} x env.num_envs={env.num_envs} x {policy.decisions} scored parts)"
        )
    policy.generator, policy.noise = generator, NoiseStream(config.seed)
    graphs = use_graphs(config.graphs, device)
    recipe = pick_recipe(config.precision, device)
    if isinstance(policy, DiffusionPolicy):
        policy.sampler.enabled = graphs
        policy.recipe = recipe
    critic = _build_critic(config, env.obs_shapes, config.seed + 1).to(device)
    buffer = RolloutBuffer(train.n_steps, env.num_envs, device)
    algorithm = cls(policy, critic, options, buffer, bootstrap_truncated=not reference)
    algorithm.generator = generator
    algorithm.recipe = recipe
    algorithm.learn.enabled = graphs and not options.use_bc_loss  # whose draws a graph would repeat
    task = config.task
    statistics = EpisodeStatistics(
        env.num_envs, env.act_steps, task.best_reward_threshold_for_success, task.sparse_reward, whole_only=reference
    )
    collector = Collector(env, policy, statistics)
    evaluator = None if reference or not train.val_freq else _evaluator(config, device, env.normalization)
    interface = _interface(policy, env.obs_shapes, env.normalization)
    return Trainer(algorithm, train, run, generator, collector, evaluator, interface, run_config)


def _build_critic(config: RunConfig, obs_shapes: ObsShapes, seed: int) -> nn.Module:
    arguments = dict(config.critic or {})
    cls = choose(CRITICS, arguments.pop("name", "mlp"), "critic.name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return construct(cls, arguments, "critic", cond_dim=math.prod(obs_shapes["state"]))


def _evaluator(config: RunConfig, device: torch.device, normalization: Normalization) -> Evaluator:
    settings = env_config(config, config.train.eval_episodes)
    seed = config.seed + EVALUATION_SEED_OFFSET
    task = config.task
    return Evaluator(
        lambda: make_env(settings, device, seed, normalization, training=False),
        seed,
        task.best_reward_threshold_for_success,
        task.sparse_reward,
    )


def _require_same_dims(path: str, obs_shapes: ObsShapes, action_dim: int, env: ChunkEnv) -> None:
    data, simulated = (dict(obs_shapes), action_dim), (dict(env.obs_shapes), env.action_dim)
    if data != simulated:
        raise UserError(
            f"data.path={path} has observations {data[0]} and {data[1]} action dims, the environment "
            f"{simulated[0]} and {simulated[1]}"
        )


def _options(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "name"}


def _interface(
    policy: Policy, obs_shapes: ObsShapes, normalization: Normalization | None
) -> Callable[[], Mapping[str, Any]]:
    """What a checkpoint tells, as ``interface``, to those who only use its policy."""
    return lambda: {
        "obs_shapes": dict(obs_shapes),
        "action_dim": policy.action_dim,
        "ft_steps": policy.decisions,
        "normalization": None if normalization is None else normalization.state_dict(),
    }


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy from a checkpoint, and what it takes to run it in its environment."""

    policy: Policy
    config: RunConfig
    normalization: Normalization | None
    source: str

    def make_env(self, num_envs: int, device: torch.device, seed: int, act_steps: int | None = None) -> ChunkEnv:
        settings = env_config(self.config, num_envs)
        if act_steps is not None:
            settings = replace(settings, act_steps=act_steps)
        return make_env(settings, device, seed, self.normalization, training=False)


def load_policy(path: str | Path, device: torch.device) -> LoadedPolicy:
    """The policy of one of our checkpoints, or of a run directory's latest, with nothing but the file."""
    weights = load_policy_weights(path)
    if weights.interface is None:
        raise UserError(f"{path}: a checkpoint of the reference holds no configuration; pass it as policy.checkpoint")
    interface = weights.interface
    config = parse(weights.config)
    obs_shapes = {name: tuple(shape) for name, shape in interface["obs_shapes"].items()}
    policy = build_policy(config, obs_shapes, interface["action_dim"], config.seed).to(device)
    load_trained(policy, weights)
    saved = interface["normalization"]
    normalization = None if saved is None else normalization_from_state(saved)
    return LoadedPolicy(policy, config, normalization, weights.source)
