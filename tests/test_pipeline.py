"""Data from nothing: train from scratch, record demonstrations, pre-train on them, fine-tune."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dppo_fast.checkpoint import Checkpoint, find
from dppo_fast.collect import main as collect
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.publish import main as publish
from tests.runs import COMMON, SMALL_DIFFUSION, SMALL_ENV, rows, train

SMALL = [*COMMON, *SMALL_ENV, "train.n_train_itr=1"]
SCRATCH = [*SMALL, "policy.network.mlp_dims=[8]", "critic.mlp_dims=[8]", "train.n_steps=16", "algorithm.batch_size=16"]
PRETRAIN = [
    *SMALL,
    "policy.options.randn_clip_value=3",
    "algorithm.batch_size=16",
    "algorithm.learning_rate=1e-2",
    "algorithm.lr_scheduler.min_lr=1e-2",
    "train.n_train_itr=2",
]
FINETUNE = [
    *SMALL,
    *SMALL_DIFFUSION,
    "policy.options.ft_denoising_steps=2",
    "critic.mlp_dims=[8,8,8]",
    "train.n_steps=4",
    "algorithm.batch_size=8",
]
GAUSSIAN = ["policy.network.mlp_dims=[8,8]", "policy.network.fixed_std=0.1"]


def demonstrate(task: str, folder: Path) -> Path:
    """Train a demonstrator and record its episodes, of 20 steps at most; gives the folder of both files."""
    scratch = [f"cfg=gym/scratch/{task}-v2/demonstrator", *SCRATCH, "env.max_episode_steps=20"]
    assert train(*scratch, f"logdir={folder}/demonstrator") == 0
    data = folder / "gym" / f"{task}-medium-v2"
    arguments = [f"checkpoint={folder}/demonstrator", f"out={data}", "steps=150", "num_envs=4", "device=cpu"]
    assert collect(arguments) == 0
    return data


def returns(run: Path) -> list[float]:
    """The evaluation returns before the first and after the last iteration."""
    table = rows(run)
    return [table[0]["eval/return"], table[-1]["eval/return"]]


def assert_starts_where_it_ended(run: Path, pretraining: Path) -> None:
    """Both evaluate the same policy in the same episodes; rounding may differ, as F splits the chain in two."""
    untrained, trained = returns(pretraining)
    assert returns(run)[0] == pytest.approx(trained, rel=1e-3)
    assert trained != pytest.approx(untrained, rel=1e-2)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with data of Hopper, and the overrides that use it."""
    folder = tmp_path_factory.mktemp("hopper")
    data = demonstrate("hopper", folder)
    return folder, [f"env.normalization={data}/normalization.npz"]


def test_the_recorded_data(hopper: tuple[Path, list[str]]) -> None:
    data = Trajectories.load(hopper[0] / "gym" / "hopper-medium-v2" / "train.npz")
    with np.load(hopper[0] / "gym" / "hopper-medium-v2" / "normalization.npz") as file:
        assert {name: file[name].shape for name in file} == {
            "obs_min": (11,), "obs_max": (11,), "action_min": (3,), "action_max": (3,)
        }  # fmt: skip
    assert len(data.states) >= 150
    assert 1 < data.traj_lengths.max() <= 20
    assert data.rewards is not None
    for values in (data.states, data.actions):
        np.testing.assert_allclose(
            (values.min(0), values.max(0)), [[-1] * values.shape[1], [1] * values.shape[1]], atol=1e-3
        )


def test_fine_tuning_starts_where_pretraining_ended(hopper: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, common = hopper
    pretrain = ["cfg=gym/pretrain/hopper-medium-v2/pre_diffusion_mlp", *PRETRAIN, *SMALL_DIFFUSION, *common]
    assert train(*pretrain, f"data.path={folder}/gym/hopper-medium-v2/train.npz", f"logdir={tmp_path}/pre") == 0
    assert publish([f"checkpoint={tmp_path}/pre", f"out={tmp_path}/policy.safetensors"]) == 0
    weights = Checkpoint.load(find(tmp_path / "pre")).weights
    raw, average = ({f"network.{k[6:]}": v for k, v in weights[module].items()} for module in ("policy", "ema"))
    torch.save({"epoch": 2, "model": raw, "ema": average}, tmp_path / "state_2.pt")
    finetune = ["cfg=gym/finetune/hopper-v2/ft_ppo_diffusion_mlp", *FINETUNE, *common]
    for checkpoint in ("pre", "policy.safetensors", "state_2.pt"):
        run = tmp_path / f"from_{checkpoint}"
        assert train(*finetune, f"policy.checkpoint={tmp_path}/{checkpoint}", f"logdir={run}") == 0
        assert_starts_where_it_ended(run, tmp_path / "pre")
        assert rows(run) == rows(tmp_path / "from_pre")
    before, after = returns(tmp_path / "from_pre")
    assert after != before


def test_a_gaussian_policy_is_fine_tuned_from_its_trained_network(
    hopper: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, common = hopper
    pretrain = ["cfg=gym/pretrain/hopper-medium-v2/pre_gaussian_mlp", *PRETRAIN, *GAUSSIAN, *common]
    assert train(*pretrain, f"data.path={folder}/gym/hopper-medium-v2/train.npz", f"logdir={tmp_path}/pre") == 0
    finetune = ["cfg=gym/scratch/hopper-v2/ppo_gaussian_mlp", *SCRATCH, *GAUSSIAN, "critic.mlp_dims=[8,8,8]", *common]
    activation = "policy.network.activation_type=Mish"
    assert train(*finetune, activation, f"policy.checkpoint={tmp_path}/pre", f"logdir={tmp_path}/run") == 0
    assert_starts_where_it_ended(tmp_path / "run", tmp_path / "pre")


@pytest.mark.parametrize("task", ["walker2d", "halfcheetah"])
def test_other_tasks_find_their_data(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations look for data and normalisation below DPPO_DATA_DIR."""
    monkeypatch.setenv("DPPO_DATA_DIR", str(tmp_path))
    demonstrate(task, tmp_path)
    short = "env.max_episode_steps=20"
    pretrain = [f"cfg=gym/pretrain/{task}-medium-v2/pre_diffusion_mlp", *PRETRAIN, *SMALL_DIFFUSION, short]
    assert train(*pretrain, f"logdir={tmp_path}/pre") == 0
    finetune = [f"cfg=gym/finetune/{task}-v2/ft_ppo_diffusion_mlp", *FINETUNE, short]
    assert train(*finetune, f"policy.checkpoint={tmp_path}/pre", f"logdir={tmp_path}/run") == 0
    assert np.isfinite(returns(tmp_path / "run")).all()
