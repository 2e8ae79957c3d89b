"""The command line: help, composition, overrides, sweeps, and what a run directory holds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dppo_fast.build import LogConfig, build_trainer, parse
from dppo_fast.checkpoint import load_policy_weights
from dppo_fast.cli import config_folder, config_names, outline
from dppo_fast.collect import main as collect
from dppo_fast.config import plain, resolve_path
from dppo_fast.publish import main as publish
from tests.runs import BC, DPPO, PPO, assert_same_runs, demonstrations, rows, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that is logged by default."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(*DPPO, "log.tensorboard=true", f"logdir={folder}") == 0
    return folder


def shipped() -> list[str]:
    """Configurations that need nothing but what the package holds; IBRL starts from a policy of one's own."""
    outlines = {name: outline(name) for name in config_names()}
    return [
        name
        for name, (task, algorithm, _) in outlines.items()
        if task == "hopper-medium-v2" and algorithm not in ("evaluation", "ibrl")
    ]


@pytest.mark.parametrize("name", shipped())
def test_hopper_s_configurations_build_with_what_is_shipped(name: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_folder()), version_base=None):
        config = parse(plain(compose(name, [f"logdir={tmp_path}", "device=cpu"])))
    trainer = build_trainer(config, tmp_path)
    assert trainer.collector is None or trainer.collector.env.action_dim == 3


def test_a_configuration_without_algorithm_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = load_policy_weights(resolve_path("asset:hopper-medium-v2/policy.safetensors")).actor
    model = {f"network.{name}": value for name, value in network.items()}
    torch.save({"epoch": 3000, "model": model, "ema": model}, tmp_path / "state_3000.pt")
    arguments = ["cfg=gym/eval/hopper-v2/eval_diffusion_mlp", "device=cpu", f"logdir={tmp_path}/evaluation"]
    assert train(*arguments) == 2
    assert capsys.readouterr().err == "error: policy.checkpoint is missing: give the policy to evaluate\n"
    short = ["train.eval_episodes=2", "env.max_episode_steps=8"]
    assert train(*arguments, *short, f"policy.checkpoint={tmp_path}/state_3000.pt") == 0
    assert len((tmp_path / "evaluation" / "episodes.csv").read_text().splitlines()) == 1 + 2 * 2


@pytest.mark.parametrize("main", [train, lambda *arguments: collect(arguments), lambda *arguments: publish(arguments)])
def test_help_explains_the_command(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("python -m dppo_fast.")
    assert "--list" in text if main is train else "checkpoint: " in text


def test_help_and_cfg_show_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        train("cfg=quickstart", "algorithm.gamma=0.75", "--help")
    assert "gamma: 0.75" in capsys.readouterr().out
    assert train("cfg=quickstart", "algorithm.gamma=0.75", "--cfg", "job") == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.algorithm.gamma, shown.algorithm.name) == (0.75, "dppo")


def test_every_group_takes_overrides(tmp_path: Path) -> None:
    overrides = {
        "seed": 3,
        "task.best_reward_threshold_for_success": 0.5,
        "env.max_episode_steps": 16,
        "env.normalization": "none",
        "policy.network.activation_type": "GELU",
        "policy.options.randn_clip_value": 2.5,
        "policy.eta": None,
        "critic.activation_type": "Tanh",
        "algorithm.actor_lr_scheduler.warmup_steps": 1,
        "data.max_n_episodes": 2,
        "train.save_model_freq": 0,
        "log.live": False,
    }
    given = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    groups = ["piece/env@env=hopper", "piece/critic@critic=mlp"]
    assert train(*DPPO, *groups, *given, "train.n_train_itr=1", f"logdir={tmp_path}/run") == 0
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert {key: OmegaConf.select(saved, key) for key in overrides} == overrides


def test_a_sweep_makes_a_run_directory_for_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*PPO, "train.n_train_itr=1", "--multirun", "seed=1,2", "logdir=sweep/${seed}") == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "MUJOCO_LOG.TXT") == ["sweep"]
    runs = {path.name: rows(path) for path in (tmp_path / "sweep").iterdir()}
    assert runs.keys() == {"1", "2"}
    assert runs["1"] != runs["2"]


def test_without_logdir_the_directory_tells_configuration_time_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*PPO, "train.n_train_itr=1", "seed=5") == 0
    (made,) = (tmp_path / "runs" / "gym" / "scratch" / "hopper-v2" / "demonstrator").iterdir()
    assert made.name.endswith("_5")
    assert (made / "config.yaml").is_file()


def test_the_run_directory(run: Path) -> None:
    names = {"config.yaml", "metrics.jsonl", "metrics.csv", "tensorboard", "learning_curve.png", "checkpoint"}
    assert {path.name for path in run.iterdir()} == names
    table = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in table] == [0, 1, 2, 3]
    assert [row["env_steps"] for row in table] == [0, 72, 144, 216]
    assert ["eval/return" in row for row in table] == [True, False, True, True]
    for key in ("train/episodes", "loss/policy", "loss/value", "ppo/approx_kl", "time/collect", "steps_per_second"):
        assert all(key in row for row in table[1:]), key
    with (run / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [{key: float(cell) for key, cell in line.items() if cell} for line in lines] == table
    assert next((run / "tensorboard").iterdir()).stat().st_size > 0
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == [
        f"iteration_{i:06d}.safetensors" for i in (0, 2, 3)
    ]


def test_config_yaml_alone_repeats_the_run(run: Path, tmp_path: Path) -> None:
    assert train(f"cfg={run}/config.yaml", "log.tensorboard=false", f"logdir={tmp_path}/again") == 0
    assert_same_runs(run, tmp_path / "again")


def test_a_configuration_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\nseed: 77\n")
    assert train(f"cfg={tmp_path}/mine.yaml", "train.n_steps=3", "--cfg", "job") == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.seed, shown.train.n_steps, shown.algorithm.name) == (77, 3, "dppo")


def test_a_run_ends_with_a_table_and_the_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = demonstrations(tmp_path / "data.npz")
    assert train(*BC, f"data.path={data}", f"logdir={tmp_path}/run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["learning", "curve", f"{tmp_path}/run/learning_curve.png"]
    assert lines[-1].split() == ["checkpoint", f"{tmp_path}/run/checkpoint/iteration_000003.safetensors"]
    assert any(line.split()[:1] == ["return"] and "±" in line for line in lines)


def test_wandb_s_entity_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_WANDB_ENTITY", "ours")
    for given, entity in ({"project": "p"}, "ours"), ({"entity": "mine"}, "mine"):
        assert (LogConfig(wandb=given).wandb or {})["entity"] == entity
    assert LogConfig().wandb is None
