"""The studies of Lift and Push: their verdict, and that their commands run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.manipulation import STUDIES, main
from dppo_fast.log import read_metrics
from tests.runs import COMMON


@pytest.mark.parametrize(
    ("success", "code"), [((0.3, 0.9, 0.95), 0), ((0.7, 0.95), 0), ((0.29, 1), 1), ((0.71, 1), 1), ((0.5, 1, 0.94), 1)]
)
def test_verdict(success: tuple[float, ...], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i},{1000 * i},{rate}" for i, rate in enumerate(success)]
    rows.insert(1, "1,500,")
    run = tmp_path / "run" / "finetuned"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("\n".join(["iteration,env_steps,eval/success_rate", *rows]) + "\n")
    assert main(["report", "--task", "lift", str(run.parent), "--results", str(tmp_path)]) == code
    assert (tmp_path / "lift.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert (tmp_path / "lift.png").stat().st_size > 5_000
    before, after = success[0], success[-1]
    assert f"lift: {before:.0%} -> {after:.0%} after {len(success) - 1},000 env steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", STUDIES)
def test_the_study_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lift":
        pytest.importorskip("robosuite", reason="needs pip install 'dppo-fast[robomimic]'")
    short = ("num_envs=1", "steps=40", "env.max_episode_steps=40", "env.num_threads=1")
    study = replace(STUDIES[name], demonstrations=(*STUDIES[name].demonstrations, *short))
    monkeypatch.setitem(STUDIES, name, study)
    small = [
        *COMMON,
        "env.num_threads=1",
        "env.num_envs=1",
        "env.max_episode_steps=8",
        "policy.network.mlp_dims=[8,8,8]",
        "algorithm.batch_size=4",
        "train.n_train_itr=1",
        "train.n_steps=4",
        "train.val_freq=1",
        "train.eval_episodes=1",
    ]
    assert main(["run", "--task", name, "--out", str(tmp_path / "run"), *small]) == 0
    assert main(["report", "--task", name, str(tmp_path / "run"), "--results", str(tmp_path)]) == 1
    first, last = read_metrics(tmp_path / f"{name}.csv")
    assert (first["env_steps"], first["eval/success_rate"]) == (0, 0)
    assert (last["env_steps"], last["eval/success_rate"]) == (16, 0)
