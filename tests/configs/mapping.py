"""The one table between the reference's configuration keys and ours; docs/migrating.md shows it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Values = Mapping[str, Any]
"""Dotted key -> value: one configuration, flat."""


REFERENCE: dict[str, dict[str, Any]] = json.loads(
    gzip.decompress(Path(__file__).with_name("reference_values.json.gz").read_bytes())
)
"""Name -> the values of each of the reference's configurations."""


class Absent(NamedTuple):
    """We have no such key, because ..."""

    reason: str


class Converted(NamedTuple):
    """``ours`` says the same in another way: ``convert`` makes our value of the reference's and its configuration."""

    ours: str
    convert: Callable[[Any, Values], Any]
    reason: str


def local(path: str | None, _: Values) -> str | None:
    """A published file's path with DPPO_DATA_DIR and DPPO_LOG_DIR unset."""
    return path and path.replace("DATA/", "data/").replace("LOG/", "log/")


def task_name(name: str, _: Values) -> str:
    return "avoid" if name == "avoiding-m5" else name.removesuffix("_low_dim").removesuffix("_med_dim")


def in_decisions(value: int, values: Values) -> int:
    """One-step iterations in iterations of as many decisions as the reference logs at once."""
    return value // values.get("train.log_freq", 1)


DERIVED = Absent("dimensions follow from the environment or the data")
DEVICE = Absent("found out, where the reference names cuda:0")
VIDEOS = Absent("`render` chooses what is recorded")
ONE_DATASET = Absent("there is one kind of dataset")
ALWAYS = Absent("always so")
OWN_EVALUATION = Absent("whole episodes are evaluated, see `train.eval_episodes`")
PLOT = Absent("docs/environments.md shows how to draw the trajectories")
TASK = Converted("env.id", task_name, "a furniture's randomness is an option; avoid's three modes differ in data alone")
NORMALIZATION = Converted("env.normalization", local, "a path; downloaded when missing")
DATA = Converted("data.path", local, "a path; downloaded when missing")
POLICY = Converted("policy.checkpoint", local, "a path; downloaded when missing")
CAMERAS = Converted("env.options.cameras", lambda keys, _: [key.removesuffix("_image") for key in keys], "names")
LONGER = "an iteration is as many decisions as the reference logs at once; products with n_steps are equal"

KEYS: dict[str, str | Absent | Converted] = {
    "_target_": "algorithm.name",
    "seed": "seed",
    "device": DEVICE,
    "*_dim": DERIVED,
    "act_steps": "task.act_steps",
    "cond_steps": "task.cond_steps",
    "img_cond_steps": "task.img_cond_steps",
    "horizon_steps": "task.horizon_steps",
    "denoising_steps": "policy.options.denoising_steps",
    "ft_denoising_steps": "policy.options.ft_denoising_steps",
    "ddim_steps": "policy.options.ddim_steps",
    "use_ddim": Absent("`policy.options.ddim_steps` says it; null is DDPM"),
    "num_modes": "policy.network.num_modes",
    "n_steps": OWN_EVALUATION,
    "render_num": VIDEOS,
    "mode": Absent("`data.folder` says it"),
    "task": TASK,
    "randomness": "env.options.randomness",
    "shape_meta.*": DERIVED,
    "robomimic_env_cfg_path": Absent("`env.id` says it; the four tasks are built in"),
    "base_policy_path": POLICY,
    "normalization_path": NORMALIZATION,
    "train_dataset_path": DATA,
    "offline_dataset_path": DATA,
    "env": TASK,
    "env_name": TASK,
    "env.name": TASK,
    "env.env_type": Absent("`env.id` says it"),
    "env.n_envs": "env.num_envs",
    "env.max_episode_steps": "env.max_episode_steps",
    "env.best_reward_threshold_for_success": "task.best_reward_threshold_for_success",
    "env.reset_at_iteration": "train.reset_at_iteration",
    "env.save_video": VIDEOS,
    "env.save_full_observations": PLOT,
    "env.use_image_obs": Absent("`env.options.cameras` says it"),
    "env.specific.act_steps": "task.act_steps",
    "env.specific.furniture": "env.id",
    "env.specific.headless": ALWAYS,
    "env.specific.normalization_path": NORMALIZATION,
    "env.specific.obs_steps": "task.cond_steps",
    "env.specific.randomness": "env.options.randomness",
    "env.specific.sparse_reward": "task.sparse_reward",
    "env.wrappers.*.normalization_path": NORMALIZATION,
    "env.wrappers.multi_step.max_episode_steps": "env.max_episode_steps",
    "env.wrappers.multi_step.n_action_steps": "task.act_steps",
    "env.wrappers.multi_step.n_obs_steps": "task.cond_steps",
    "env.wrappers.multi_step.pass_full_observations": PLOT,
    "env.wrappers.multi_step.reset_within_step": Absent("always; where it is false, episodes are iterations"),
    "env.wrappers.robomimic_image.image_keys": CAMERAS,
    "env.wrappers.*.low_dim_keys": Absent("the default of `env.options.low_dim_keys`"),
    "env.wrappers.robomimic_image.shape_meta.*": DERIVED,
    "model._target_": "policy.name",
    "model.*": "policy.options.*",
    "model.*_dim": DERIVED,
    "model.device": DEVICE,
    "model.network_path": POLICY,
    "model.horizon_steps": "task.horizon_steps",
    "model.use_ddim": Absent("`policy.options.ddim_steps` says it; null is DDPM"),
    "model.gamma_denoising": "algorithm.gamma_denoising",
    "model.clip_ploss_coef": "algorithm.clip_ploss_coef",
    "model.clip_ploss_coef_base": "algorithm.clip_ploss_coef_base",
    "model.clip_ploss_coef_rate": "algorithm.clip_ploss_coef_rate",
    "model.eta._target_": "policy.eta.name",
    "model.eta.*": "policy.eta.*",
    "model.eta.*_dim": DERIVED,
    "model.eta.mlp_dims": Absent("a fixed eta has no network"),
    "model.actor._target_": "policy.network.name",
    "model.actor.*": "policy.network.*",
    "model.actor.action_dim": DERIVED,
    "model.actor.cond_dim": DERIVED,
    "model.actor.horizon_steps": "task.horizon_steps",
    "model.actor.augment": Absent("in all of these `train.augment` says it"),
    "model.network._target_": "policy.network.name",
    "model.network.*": "policy.network.*",
    "model.network.action_dim": DERIVED,
    "model.network.cond_dim": DERIVED,
    "model.network.horizon_steps": "task.horizon_steps",
    "model.network.augment": "algorithm.augment",
    "model.*.backbone.cfg.*": "policy.network.backbone.*",
    "model.*.backbone._target_": Absent("there is one kind of encoder"),
    "model.*.backbone.obs_shape": DERIVED,
    "model.*.backbone.num_channel": DERIVED,
    "model.*.backbone.img_h": DERIVED,
    "model.*.backbone.img_w": DERIVED,
    "model.actor.num_img": DERIVED,
    "model.network.num_img": DERIVED,
    "model.critic.num_img": DERIVED,
    "model.critic._target_": "critic.name",
    "model.critic.*": "critic.*",
    "model.critic.backbone.cfg.*": "critic.backbone.*",
    "model.critic.cond_dim": DERIVED,
    "model.critic.action_dim": DERIVED,
    "model.critic.action_steps": "task.act_steps",
    "model.critic.augment": Absent("in all of these `train.augment` says it"),
    "model.critic.double_q": Absent("follows from the algorithm"),
    "model.critic_q._target_": "critic.name",
    "model.critic_q.*": "critic.*",
    "model.critic_q.cond_dim": DERIVED,
    "model.critic_q.action_dim": DERIVED,
    "model.critic_q.action_steps": "task.act_steps",
    "model.critic_v._target_": "critic.name",
    "model.critic_v.*": "critic.*",
    "model.critic_v.cond_dim": DERIVED,
    "model.n_critics": "algorithm.n_critics",
    "model.backup_entropy": "algorithm.backup_entropy",
    "model.cql_min_q_weight": "algorithm.cql_min_q_weight",
    "model.soft_action_sample": "algorithm.soft_action_sample",
    "model.soft_action_sample_beta": "algorithm.soft_action_sample_beta",
    "model.tanh_output": Absent("that is the policy squashed_gaussian"),
    "model.sde._target_": Absent("the variance-preserving SDE is the only one"),
    "model.sde.N": "policy.options.denoising_steps",
    "model.sde_min_beta": Absent("no beta is that small"),
    "model.sde_probability_flow": ALWAYS,
    "model.atol": Absent("steps are fixed"),
    "model.rtol": Absent("steps are fixed"),
    "plotter.*": PLOT,
    "ema.decay": "algorithm.ema_decay",
    "train.*": "algorithm.*",
    "train.batch_size": Converted(
        "algorithm.batch_size",
        lambda size, values: size * values.get("train.grad_accumulate", 1),
        "a step sees the pairs of all minibatches accumulated, as one minibatch",
    ),
    "train.grad_accumulate": Converted(
        "algorithm.microbatch_size",
        lambda _, values: values["train.batch_size"],
        "what is computed at once is the microbatch; gradients are those of the whole minibatch",
    ),
    "train.critic_tau": "algorithm.target_ema_rate",
    "train.logprob_batch_size": Absent("the sampler emits the behaviour log-probs"),
    "train.force_train": Absent("evaluation never takes an iteration away"),
    "train.eval_deterministic": ALWAYS,
    "train.target_entropy": Absent("the default, minus the size of a chunk"),
    "train.automatic_entropy_tuning": ALWAYS,
    "train.log_freq": Absent("every iteration is logged"),
    "train.n_eval_episode": "train.eval_episodes",
    "train.train_online": Absent("`algorithm.n_offline_itr` says it"),
    "train.n_episode_per_epoch": Absent("an iteration is `train.n_steps` decisions"),
    "train.n_steps": Converted("train.n_steps", lambda steps, values: steps * values.get("train.log_freq", 1), LONGER),
    "train.n_train_itr": Converted("train.n_train_itr", in_decisions, LONGER),
    "train.val_freq": Converted("train.val_freq", in_decisions, LONGER),
    "train.save_model_freq": Converted("train.save_model_freq", in_decisions, LONGER),
    "train.n_epochs": "train.n_train_itr",
    "train.plotter.*": PLOT,
    "train.render.*": VIDEOS,
    "train_dataset.*": ONE_DATASET,
    "offline_dataset.*": ONE_DATASET,
    "*_dataset.cond_steps": "task.cond_steps",
    "*_dataset.img_cond_steps": "task.img_cond_steps",
    "*_dataset.horizon_steps": "task.horizon_steps",
    "*_dataset.dataset_path": DATA,
    "*_dataset.max_n_episodes": "data.max_n_episodes",
    "*_dataset.discount_factor": "algorithm.gamma",
}
"""The reference's key -> ours. A star stands for any name, the last one for the same name in ours; of the rows that
fit, the one with most other characters holds.
"""

CLASSES: dict[str, Any] = {
    "TrainDiffusionAgent": "bc",
    "TrainGaussianAgent": "bc",
    **dict.fromkeys(("TrainPPODiffusionAgent", "TrainPPOImgDiffusionAgent"), "dppo"),
    **dict.fromkeys(("TrainPPOGaussianAgent", "TrainPPOImgGaussianAgent"), "ppo"),
    "TrainPPOExactDiffusionAgent": "exact_ppo",
    **{f"Train{name.upper()}DiffusionAgent": name for name in ("rwr", "awr", "dipo", "idql", "dql", "qsm")},
    "TrainSACAgent": "sac",
    "TrainRLPDAgent": "rlpd",
    "TrainCalQLAgent": "calql",
    "TrainIBRLAgent": "ibrl",
    **{f"Eval{kind}Agent": {} for kind in ("Diffusion", "Gaussian", "ImgDiffusion", "ImgGaussian")},
    **dict.fromkeys((f"{name}Diffusion" for name in ("PPO", "RWR", "AWR", "DIPO", "IDQL", "DQL", "QSM")), "diffusion"),
    "DiffusionModel": "diffusion",
    "DiffusionEval": "diffusion",
    "PPOExactDiffusion": "flow",
    **dict.fromkeys((f"{name}_Gaussian" for name in ("SAC", "RLPD", "CalQL")), "squashed_gaussian"),
    **dict.fromkeys(("IBRL_Gaussian", "PPO_Gaussian", "GaussianModel"), "gaussian"),
    **dict.fromkeys(("PPO_GMM", "GMMModel"), "gmm"),
    "DiffusionMLP": "diffusion_mlp",
    "VisionDiffusionMLP": "diffusion_vision_mlp",
    "Unet1D": "unet1d",
    "VisionUnet1D": "diffusion_vision_unet",
    "Gaussian_MLP": "gaussian_mlp",
    "Gaussian_VisionMLP": "gaussian_vision_mlp",
    "Gaussian_Transformer": "gaussian_transformer",
    "GMM_MLP": "gmm_mlp",
    "GMM_Transformer": "gmm_transformer",
    "CriticObs": "mlp",
    "CriticObsAct": "mlp",
    "ViTCritic": "vit",
    "EtaFixed": "fixed",
}
"""The reference's classes -> our names; an evaluation has no algorithm."""

DIFFUSION = {
    "policy.options.ddim_steps": None,
    "policy.options.denoised_clip_value": 1,
    "policy.options.eps_clip_value": None,
    "policy.options.final_action_clip_value": None,
    "policy.options.predict_epsilon": True,
    "policy.options.randn_clip_value": 10,
    "policy.eta": None,
}
STD = dict.fromkeys(("policy.options.min_sampling_denoising_std", "policy.options.min_logprob_denoising_std"), 0.1)
MLP = {"activation_type": "Mish", "use_layernorm": False, "residual_style": False}
UNET = {"activation_type": "Mish", "cond_mlp_dims": None, "groupnorm_eps": 1e-5}
DENSITY = {"fixed_std": None, "learn_fixed_std": False, "std_min": 0.01, "std_max": 1}
TRANSFORMER = {**DENSITY, "transformer_activation": "gelu", "p_drop_emb": 0, "p_drop_attn": 0}
VISION = {"visual_feature_dim": 128, "dropout": 0}
PPO = {
    "algorithm.clip_vloss_coef": None,
    "algorithm.norm_adv": True,
    "algorithm.max_grad_norm": None,
    "algorithm.ent_coef": 0,
    "algorithm.use_bc_loss": False,
    "algorithm.augment": False,
    "algorithm.microbatch_size": None,
}


def _under(prefix: str, values: Values) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in values.items()}


IMPLIED: dict[str, dict[str, Any]] = {
    "DiffusionModel": DIFFUSION | {"policy.options.ft_denoising_steps": 0},
    "DiffusionEval": DIFFUSION,
    "PPODiffusion": {**DIFFUSION, **STD, **PPO},
    "PPOExactDiffusion": {**DIFFUSION, **STD, **PPO},
    **dict.fromkeys(
        (f"{name}Diffusion" for name in ("RWR", "AWR", "DIPO", "IDQL", "DQL", "QSM")),
        DIFFUSION | {"policy.options.ft_denoising_steps": 0, "algorithm.max_grad_norm": None},
    ),
    **{name: {"policy.options.randn_clip_value": 10, **PPO} for name in ("PPO_Gaussian", "PPO_GMM")},
    "DiffusionMLP": _under("policy.network", {**MLP, "time_dim": 16, "cond_mlp_dims": None}),
    "VisionDiffusionMLP": _under("policy.network", {**MLP, **VISION}),
    "Unet1D": _under("policy.network", UNET),
    "VisionUnet1D": _under("policy.network", {**UNET, "dropout": 0}),
    "Gaussian_MLP": _under("policy.network", {**MLP, **DENSITY, "tanh_output": True, "dropout": 0}),
    "Gaussian_VisionMLP": _under("policy.network", {**MLP, **DENSITY, **VISION}),
    "GMM_MLP": _under("policy.network", {**MLP, **DENSITY}),
    "Gaussian_Transformer": _under("policy.network", TRANSFORMER),
    "GMM_Transformer": _under("policy.network", TRANSFORMER),
    "CriticObs": _under("critic", MLP),
    "CriticObsAct": _under("critic", MLP),
    "ViTCritic": _under("critic", {**MLP, "dropout": 0}),
    **dict.fromkeys(
        ("TrainDiffusionAgent", "TrainGaussianAgent"),
        _under("algorithm", {"epoch_start_ema": 20, "update_ema_freq": 10, "ent_coef": 0, "augment": False}),
    ),
    **{f"StitchedSequence{kind}Dataset": {"data.max_n_episodes": None} for kind in ("", "QLearning")},
}
"""The reference's classes -> our keys whose values follow from their constructors' defaults, where it sets none."""

LENGTH = "an iteration is as many steps as the longest episode, where the reference's is an episode"
DIFFERENT: dict[str, dict[str, str]] = {
    "idql": {"algorithm.buffer_size": "the reference counts steps of all environments"},
    "qsm": {"algorithm.buffer_size": "the reference counts steps of all environments"},
    "rwr": {"algorithm.n_critic_warmup_itr": "there is no critic"},
    "calql": {
        "train.n_steps": LENGTH,
        "train.n_train_itr": "the offline iterations come on top",
        "policy.checkpoint": "the offline phase is the run's own: its first `algorithm.n_offline_itr` iterations",
    },
    "exact_ppo": {
        "policy.network.activation_type": "Hopper's base policy was trained with ReLU; the reference forgets to say so"
    },
    "evaluation": {"algorithm.augment": "augmentation is for training"},
    "hopper": dict.fromkeys(
        ("policy.checkpoint", "env.normalization", "data.path"), "we ship our own; theirs load where one names them"
    ),
}
"""Algorithm or task -> our keys whose values are others on purpose, and why."""


@cache
def row(key: str) -> str:
    """The row of KEYS that holds for the reference's ``key``."""
    fitting = [pattern for pattern in KEYS if fnmatchcase(key, pattern)]
    assert fitting, f"{key} has no row in KEYS"
    return max(fitting, key=lambda pattern: len(pattern.replace("*", "")))


def translated(values: Values) -> dict[str, Any]:
    """Our keys and the values that they should have, for a configuration of the reference."""
    ours: dict[str, Any] = {}
    for key, value in values.items():
        pattern = row(key)
        match KEYS[pattern]:
            case str(own):
                head, _, tail = pattern.rpartition("*")
                start = key.rfind(head.rpartition("*")[2]) + len(head.rpartition("*")[2])
                name = key[start : len(key) - len(tail)]
                own = own.replace("*", name)
                if key.endswith("_target_"):
                    value = CLASSES[value.rpartition(".")[2]]
                    own = own if value else own.removesuffix(".name")
            case Converted(own, convert, _):
                value = convert(value, values)
            case Absent():
                continue
        assert ours.setdefault(own, value) == value, f"{own} is {ours[own]} and {value}"
    classes = [value.rpartition(".")[2] for key, value in values.items() if key.endswith("_target_")]
    for name in classes:
        for key, value in IMPLIED.get(name, {}).items():
            if not any(given.startswith(f"{key}.") for given in ours):
                ours.setdefault(key, value)
    return ours


def key_table() -> str:
    """KEYS for docs/migrating.md, by our keys; below, what has none, by the reason."""
    moved: dict[tuple[str, str], list[str]] = {}
    left: dict[str, list[str]] = {}
    for theirs, ours in KEYS.items():
        match ours:
            case str():
                moved.setdefault((ours, ""), []).append(theirs)
            case Converted(own, _, reason):
                moved.setdefault((own, reason), []).append(theirs)
            case Absent(reason):
                left.setdefault(reason, []).append(theirs)
    rows = [f"| {_code(theirs)} | `{ours}` | {note} |" for (ours, note), theirs in moved.items()]
    gone = [f"| {_code(theirs)} | {reason} |" for reason, theirs in left.items()]
    head = ["| the reference | here | |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, "", "| the reference | why there is no such key |", "| --- | --- |", *gone])


def _code(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def difference_table() -> str:
    """DIFFERENT for docs/migrating.md."""
    rows = [f"| {case} | `{key}` | {reason} |" for case, keys in DIFFERENT.items() for key, reason in keys.items()]
    return "\n".join(["| configurations | key | why |", "| --- | --- | --- |", *rows])
