"""Our configurations hold the reference's hyperparameters, of which `reference_values.json` is a copy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dppo_fast.cli import config_folder

REFERENCE: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("reference_values.json").read_text())


class Absent(NamedTuple):
    """We have no such key, because ..."""

    reason: str


DERIVED = Absent("dimensions follow from the environment or the data")
OUR_FILES = Absent("we ship or make our own data, normalisation and base policies; theirs load where one names them")
DEVICE = Absent("found out, where the reference names cuda:0")
VIDEOS = Absent("no rendering from training runs yet")

KEYS: dict[str, str | Absent] = {
    "_target_": "algorithm.name",
    "seed": "seed",
    "device": DEVICE,
    "*_dim": DERIVED,
    "act_steps": "task.act_steps",
    "cond_steps": "task.cond_steps",
    "horizon_steps": "task.horizon_steps",
    "denoising_steps": "policy.options.denoising_steps",
    "ft_denoising_steps": "policy.options.ft_denoising_steps",
    "base_policy_path": OUR_FILES,
    "normalization_path": OUR_FILES,
    "train_dataset_path": OUR_FILES,
    "env": "env.id",
    "env_name": "env.id",
    "env.name": "env.id",
    "env.n_envs": "env.num_envs",
    "env.max_episode_steps": "env.max_episode_steps",
    "env.best_reward_threshold_for_success": "task.best_reward_threshold_for_success",
    "env.reset_at_iteration": "train.reset_at_iteration",
    "env.save_video": VIDEOS,
    "env.wrappers.mujoco_locomotion_lowdim.normalization_path": OUR_FILES,
    "env.wrappers.multi_step.max_episode_steps": "env.max_episode_steps",
    "env.wrappers.multi_step.n_action_steps": "task.act_steps",
    "env.wrappers.multi_step.n_obs_steps": "task.cond_steps",
    "env.wrappers.multi_step.reset_within_step": Absent("true in all of these, and always so here"),
    "model._target_": "policy.name",
    "model.*": "policy.options.*",
    "model.*_dim": DERIVED,
    "model.device": DEVICE,
    "model.network_path": OUR_FILES,
    "model.horizon_steps": "task.horizon_steps",
    "model.gamma_denoising": "algorithm.gamma_denoising",
    "model.clip_ploss_coef": "algorithm.clip_ploss_coef",
    "model.clip_ploss_coef_base": "algorithm.clip_ploss_coef_base",
    "model.clip_ploss_coef_rate": "algorithm.clip_ploss_coef_rate",
    "model.actor._target_": "policy.network.name",
    "model.actor.*": "policy.network.*",
    "model.actor.action_dim": DERIVED,
    "model.actor.cond_dim": DERIVED,
    "model.actor.horizon_steps": "task.horizon_steps",
    "model.network._target_": "policy.network.name",
    "model.network.*": "policy.network.*",
    "model.network.action_dim": DERIVED,
    "model.network.cond_dim": DERIVED,
    "model.network.horizon_steps": "task.horizon_steps",
    "model.critic._target_": "critic.name",
    "model.critic.*": "critic.*",
    "model.critic.cond_dim": DERIVED,
    "model.critic.action_dim": DERIVED,
    "model.critic.action_steps": "task.act_steps",
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
    "model.sde_probability_flow": Absent("always"),
    "model.atol": Absent("steps are fixed"),
    "model.rtol": Absent("steps are fixed"),
    "ema.decay": "algorithm.ema_decay",
    "train.*": "algorithm.*",
    "train.critic_tau": "algorithm.target_ema_rate",
    "train.eval_deterministic": Absent("true in all of these, and always so here"),
    "train.target_entropy": Absent("the default, minus the size of a chunk"),
    "train.automatic_entropy_tuning": Absent("true in all of these, and always so here"),
    "train.log_freq": Absent("an iteration is as long"),
    "train.n_eval_episode": Absent("evaluation has environments of its own"),
    "train.train_online": Absent("the number of offline iterations says it"),
    "train.n_episode_per_epoch": Absent("evaluation has environments of its own"),
    "train.n_steps": "train.n_steps",
    "train.n_train_itr": "train.n_train_itr",
    "train.n_epochs": "train.n_train_itr",
    "train.val_freq": "train.val_freq",
    "train.save_model_freq": "train.save_model_freq",
    "train.render.*": VIDEOS,
    "train_dataset._target_": Absent("there is one kind of dataset"),
    "train_dataset.cond_steps": "task.cond_steps",
    "train_dataset.horizon_steps": "task.horizon_steps",
    "train_dataset.dataset_path": OUR_FILES,
    "train_dataset.device": DEVICE,
    "offline_dataset._target_": Absent("there is one kind of dataset"),
    "offline_dataset.cond_steps": "task.cond_steps",
    "offline_dataset.horizon_steps": "task.horizon_steps",
    "offline_dataset.dataset_path": OUR_FILES,
    "offline_dataset.device": DEVICE,
    "offline_dataset.discount_factor": "algorithm.gamma",
    "offline_dataset.get_mc_return": Absent("follows from the algorithm"),
    "offline_dataset.max_n_episodes": "data.max_n_episodes",
    "offline_dataset_path": OUR_FILES,
}
"""The reference's key -> ours. A star stands for any name; of the rows that fit, the one with most other characters
holds.
"""

REPLAY_STEPS = "the reference counts steps of all environments"
LONGER = "an iteration is 200 decisions instead of 1; products with n_steps are equal"
DIFFERENT: dict[str, dict[str, str]] = {
    "idql": {"algorithm.buffer_size": REPLAY_STEPS},
    "qsm": {"algorithm.buffer_size": REPLAY_STEPS},
    "rwr": {"algorithm.n_critic_warmup_itr": "there is no critic"},
    "calql": {"train.n_steps": "an iteration is 1000 decisions, where the reference's is an episode"},
    **{
        name: dict.fromkeys(("train.n_steps", "train.n_train_itr", "train.val_freq", "train.save_model_freq"), LONGER)
        for name in ("sac", "rlpd", "ibrl")
    },
}
"""Algorithm -> our keys whose values are others on purpose, and why."""

CLASSES = {
    "TrainPPODiffusionAgent": "dppo",
    "TrainPPOExactDiffusionAgent": "exact_ppo",
    "TrainRWRDiffusionAgent": "rwr",
    "TrainAWRDiffusionAgent": "awr",
    "TrainDIPODiffusionAgent": "dipo",
    "TrainIDQLDiffusionAgent": "idql",
    "TrainDQLDiffusionAgent": "dql",
    "TrainQSMDiffusionAgent": "qsm",
    "TrainSACAgent": "sac",
    "TrainRLPDAgent": "rlpd",
    "TrainCalQLAgent": "calql",
    "TrainIBRLAgent": "ibrl",
    "TrainPPOGaussianAgent": "ppo",
    "TrainDiffusionAgent": "bc",
    "TrainGaussianAgent": "bc",
    **dict.fromkeys((f"{name}Diffusion" for name in ("PPO", "RWR", "AWR", "DIPO", "IDQL", "DQL", "QSM")), "diffusion"),
    "PPOExactDiffusion": "flow",
    **dict.fromkeys((f"{name}_Gaussian" for name in ("SAC", "RLPD", "CalQL")), "squashed_gaussian"),
    "IBRL_Gaussian": "gaussian",
    "DiffusionModel": "diffusion",
    "PPO_Gaussian": "gaussian",
    "GaussianModel": "gaussian",
    "DiffusionMLP": "diffusion_mlp",
    "Gaussian_MLP": "gaussian_mlp",
    "CriticObs": "mlp",
    "CriticObsAct": "mlp",
}
"""The reference's classes -> our names."""


def row(key: str) -> str:
    """The row of KEYS that holds for the reference's ``key``."""
    fitting = [pattern for pattern in KEYS if fits(key, pattern)]
    assert fitting, f"{key} has no row in KEYS"
    return max(fitting, key=lambda pattern: len(pattern.replace("*", "")))


def fits(key: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    return key.startswith(head) and key.endswith(tail) if star else key == pattern


def compared(name: str) -> Iterator[tuple[str, str, Any]]:
    """Reference key, our key and the value that it should have, of the configuration ``name``."""
    for key, value in REFERENCE[name].items():
        pattern = row(key)
        ours = KEYS[pattern]
        if isinstance(ours, str):
            head, _, tail = pattern.partition("*")
            yield (
                key,
                ours.replace("*", key[len(head) : len(key) - len(tail)]),
                CLASSES[value.rpartition(".")[2]] if key.endswith("_target_") else value,
            )


@pytest.fixture(scope="module")
def composed() -> dict[str, DictConfig]:
    with initialize_config_dir(str(config_folder()), version_base=None):
        return {name: compose(name) for name in REFERENCE}


@pytest.mark.parametrize("name", REFERENCE)
def test_values_are_the_references(name: str, composed: dict[str, DictConfig]) -> None:
    missing = object()
    different = {
        ours: (key, found, expected)
        for key, ours, expected in compared(name)
        if (found := OmegaConf.select(composed[name], ours, default=missing)) != expected
    }
    assert different.keys() <= DIFFERENT.get(composed[name].algorithm.name, {}).keys(), different


def test_every_row_of_the_table_is_of_use() -> None:
    assert {row(key) for values in REFERENCE.values() for key in values} == KEYS.keys()
