"""Evaluating checkpoints: what the files and the table say, for both kinds of checkpoint, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.build import load_policy
from dppo_fast.checkpoint import Checkpoint, find, load_policy_weights
from dppo_fast.config import resolve_path
from dppo_fast.convert import to_reference
from dppo_fast.evaluate import bootstrap, main, success_rate
from dppo_fast.evaluator import Evaluator
from dppo_fast.runtime.gl import headless_gl
from tests.runs import DPPO, train
from tests.test_evaluator import LadderEnv, NoisyActor

SMALL = ["episodes=5", "num_envs=2", "device=cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with two checkpoints, the second one also as a file of the reference, and what is no checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    found = {"run": folder / "run", "reference": folder / "state_1.pt", "empty": folder / "empty"}
    assert train(*DPPO, "train.n_train_itr=1", "train.val_freq=0", f"logdir={found['run']}") == 0
    found["first"], found["second"] = find(found["run"], "previous"), find(found["run"])
    to_reference(Checkpoint.load(found["second"])).save(found["reference"])
    found["empty"].mkdir()
    found["file"] = folder / "file"
    found["file"].touch()
    return found


def evaluated(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The results and the episodes that an evaluation writes."""
    assert main([*SMALL, f"out={folder}", *arguments]) == 0
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    with (folder / "episodes.csv").open(newline="") as file:
        return results, list(csv.DictReader(file))


def test_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = bootstrap(values)
    error = 1.96 * values.std() / 20
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.02)
    assert bootstrap(values) == (mean, low, high)
    assert bootstrap(np.full(3, 7.0)) == (7, 7, 7)


def test_certain_success_is_not_certain() -> None:
    assert success_rate(np.ones(30, bool)) == pytest.approx((1, 0.88430, 1), abs=1e-5)
    assert success_rate(np.zeros(30, bool)) == pytest.approx((0, 0, 0.11570), abs=1e-5)
    mean, low, high = success_rate(np.arange(100) < 80)
    assert (mean, low, high) == pytest.approx((0.8, 0.72, 0.88), abs=0.011)


def test_envs_share_the_episodes_evenly() -> None:
    """Six in four envs: short episodes do not count more often because they are over sooner."""
    done: list[int] = []
    episodes = Evaluator(LadderEnv, 7, success_threshold=100.0, episodes=6).run(NoisyActor(), done.append)
    assert episodes.returns.tolist() == [0, 1e6, 21, 2e6, 63, 126]
    assert episodes.scores.tolist() == [0, 5e5, 5.5, 5e5, 11, 16.5]
    assert episodes.success.tolist() == [False, True, False, True, False, False]
    assert episodes.lengths.tolist() == [2, 2, 4, 4, 6, 8]
    assert (done[-1], sorted(done)) == (6, done)


def test_several_checkpoints_in_both_modes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = runs["first"], runs["second"]
    results, episodes = evaluated(tmp_path, f"checkpoint=[{first},{second}]")
    table = capsys.readouterr().out
    assert [(result["checkpoint"], result["mode"]) for result in results] == [
        (str(file), mode) for file in (first, second) for mode in ("deterministic", "stochastic")
    ]
    assert {(result["S"], result["F"], result["env"]) for result in results} == {(4, 2, "hopper-medium-v2")}
    returns = {}
    for result in results:
        own = [row for row in episodes if (row["checkpoint"], row["mode"]) == (result["checkpoint"], result["mode"])]
        assert [row["episode"] for row in own] == list("01234")
        values = np.array([float(row["return"]) for row in own])
        returns[result["checkpoint"], result["mode"]] = values
        assert result["return"] == bootstrap(values)._asdict()
        assert result["episode_length"] == np.mean([int(row["length"]) for row in own])
        success = np.array([row["success"] == "1" for row in own])
        assert result["success_rate"] == success_rate(success)._asdict()
        assert f"{result['return']['mean']:.1f}" in table or f"{result['return']['mean']:.2f}" in table
    for result in results[:2]:
        assert result["return_change"] is None
    for result in results[2:]:
        before, after = returns[str(first), result["mode"]], returns[str(second), result["mode"]]
        assert result["return_change"] == bootstrap(after - before)._asdict()
    assert len({tuple(values) for values in returns.values()}) == 4
    for line in (f"1  {first} (policy after iteration 0): hopper-medium-v2, S 4, F 2", "means over 5 episodes"):
        assert line in table


def test_the_policy_is_that_of_the_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    """As the evaluator judges it in training, with as many envs as episodes; and the same every time."""
    (result,), _ = evaluated(tmp_path / "a", f"checkpoint={runs['run']}", "mode=deterministic", "num_envs=5", "seed=3")
    loaded = load_policy(runs["second"], torch.device("cpu"))
    evaluator = Evaluator(lambda: loaded.make_env(5, torch.device("cpu"), 3), 3, success_threshold=3)
    expected = evaluator.evaluate(loaded.actor)
    assert result["return"]["mean"] == expected["return"]
    assert result["episode_length"] == expected["episode_length"]
    again, _ = evaluated(tmp_path / "b", f"checkpoint={runs['run']}", "mode=deterministic", "num_envs=5", "seed=3")
    assert again == [result]


def test_a_file_of_the_reference(runs: dict[str, Path], tmp_path: Path) -> None:
    """With the configuration of its run it does what ours does, which may be compared with it."""
    overrides = [argument for argument in DPPO if argument.startswith(("cfg=", "policy.network", "policy.options"))]
    both = f"checkpoint=[{runs['reference']},{runs['second']}]"
    (theirs, ours), _ = evaluated(tmp_path, both, "mode=stochastic", *overrides)
    assert theirs["source"].endswith("state_1.pt (policy after iteration 1)")
    assert (theirs["S"], theirs["F"], theirs["return"]) == (4, 2, ours["return"])
    assert ours["return_change"] == {"mean": 0, "low": 0, "high": 0}


def test_an_evaluation_s_configuration_names_its_checkpoint(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no algorithm, and the file may be of pre-training; with F = 0 it refuses one of fine-tuning."""
    base = load_policy_weights(resolve_path("asset:hopper-medium-v2/policy.safetensors")).actor
    network = {f"network.{name}": value for name, value in base.items()}
    torch.save({"epoch": 3000, "model": network, "ema": network}, tmp_path / "state_3000.pt")
    arguments = [
        "cfg=gym/eval/hopper-v2/eval_diffusion_mlp",
        "env.normalization=asset:hopper-medium-v2/normalization.npz",
        "mode=deterministic",
        "episodes=2",
    ]
    (result,), _ = evaluated(tmp_path / "a", *arguments, f"policy.checkpoint={tmp_path}/state_3000.pt")
    assert result["source"].endswith("state_3000.pt (ema after iteration 3000)")
    assert (result["S"], result["F"]) == (20, 0)
    assert result["return"]["mean"] > 500
    small = [argument for argument in DPPO if argument.startswith("policy.network")]
    small += ["policy.options.denoising_steps=4", f"checkpoint={runs['reference']}"]
    assert main([*SMALL, *arguments, *small]) == 2
    assert "source holds actor_ft." in capsys.readouterr().err


@pytest.mark.skipif(headless_gl() != "egl", reason="EnvPool draws with EGL, which is not there")
def test_videos(runs: dict[str, Path], tmp_path: Path) -> None:
    evaluated(tmp_path, f"checkpoint={runs['run']}", "mode=stochastic", "video=1", "episodes=2")
    (film,) = (tmp_path / "videos").iterdir()
    assert film.name == "1_stochastic_env0.mp4"
    assert film.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "checkpoint: missing; give a file or a run directory"),
        ("checkpoint=[]", "checkpoint: missing"),
        ("checkpoint={run} episodes=0", r"episodes=0 must lie in \[1, inf\)"),
        ("checkpoint={run} num_envs=0", r"num_envs=0 must lie in \[1, inf\)"),
        ("checkpoint={run} video=-1", r"video=-1 must lie in \[0, 40\]"),
        ("checkpoint={run} episodes=5 video=6", r"video=6 must lie in \[0, 5\]"),
        ("checkpoint={run} mode=random", "mode=random is unknown; choose one of deterministic, stochastic, both"),
        ("checkpoint={run} episode=5", r"episode is unknown \(did you mean episodes"),
        ("checkpoint={run} device=foo", "device=foo is unknown"),
        ("checkpoint=/nope", "checkpoint: /nope: no such checkpoint"),
        ("checkpoint=[{run},/nope]", "checkpoint: /nope: no such checkpoint"),
        ("checkpoint={empty}", "checkpoint: .*/empty: holds 0 checkpoints"),
        ("checkpoint={file}", "checkpoint: .*/file: truncated or not a safetensors file"),
        ("checkpoint={reference}", "a file of the reference tells neither task nor denoising steps; add cfg=<name>"),
        ("checkpoint={run} cfg=quickstart", "cfg is for the reference's .pt files; .*/run holds its own"),
        ("checkpoint={reference} cfg=quickstrat", "cfg=quickstrat is unknown; nearest: quickstart"),
        ("checkpoint={reference} cfg=quickstart", r"source does not fit .*has shape \[16, .* needs \[512, "),
        ("checkpoint={run} out={file}/x", "out=.*/file/x is not writable"),
        ("checkpoint={run} out={run}", "out=.*/run holds files already"),
    ],
)
def test_mistakes(
    arguments: str,
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.format(**runs).split()) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
    assert not list(tmp_path.iterdir())


def test_videos_without_their_package(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert main([*SMALL, f"checkpoint={runs['run']}", "video=1", f"out={tmp_path}/out"]) == 2
    assert re.fullmatch(r"error: .*pip install 'dppo-fast\[video\]'\n", capsys.readouterr().err)
