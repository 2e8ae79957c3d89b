"""The comparison of the algorithms is fair by construction, and reads what runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.algorithms import ENV_STEPS, EVALUATE_EVERY, METHODS, Run, main
from benchmarks.report import read_csv
from dppo_fast.algorithms import ALGORITHMS
from dppo_fast.cli import config_folder
from tests.runs import COMMON, SMALL_DIFFUSION, SMALL_ENV


def write_run(folder: Path, algorithm: str, seed: int, rows: list[dict[str, float]]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"seed: {seed}\nalgorithm: {{name: {algorithm}}}\n")
    lines = [json.dumps({"iteration": i, "time/update": 30.0, **row}) for i, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    return folder


def test_no_algorithm_is_forgotten() -> None:
    assert set(METHODS) == set(ALGORITHMS) - {"bc"}


@pytest.mark.parametrize("name", METHODS)
def test_all_take_equally_many_env_steps_and_evaluations(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    cfg, *overrides = method.arguments(3, tmp_path)
    with initialize_config_dir(str(config_folder()), version_base=None):
        config = compose(cfg.removeprefix("cfg="), overrides)
    assert config.algorithm.name == name
    assert config.algorithm.get("n_offline_itr", 0) == method.offline_iterations
    assert config.algorithm.get("n_critic_warmup_itr", 0) < config.train.n_train_itr / 2
    steps = config.env.num_envs * config.task.act_steps * config.train.n_steps
    assert steps * (config.train.n_train_itr - method.offline_iterations) == ENV_STEPS
    evaluated = {
        steps * (iteration - method.offline_iterations)
        for iteration in range(config.train.val_freq, config.train.n_train_itr + 1, config.train.val_freq)
    }
    assert evaluated >= set(range(EVALUATE_EVERY, ENV_STEPS + 1, EVALUATE_EVERY))


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    """Rows without env steps are those before the first; the last evaluation there is the one to start from.

    Evaluations between those of the table are left out.
    """
    rows = [
        {"env_steps": 0, "eval/return": 1.0, "eval/return_std": 0.1},
        {"eval/return": 2.0, "eval/return_std": 0.2},
        {"env_steps": 20_000, "eval/return": 2.5, "eval/return_std": 0.25},
        {"env_steps": 40_000, "eval/return": 3.0, "eval/return_std": 0.3},
    ]
    run = Run.read(write_run(tmp_path / "run", "calql", 7, rows))
    assert (run.algorithm, run.seed, run.minutes) == ("calql", 7, 2.0)
    assert run.returns == {0: 2.0, 40_000: 3.0}
    assert run.std is None


def test_table_and_figure(tmp_path: Path) -> None:
    rows = [{"env_steps": at, "eval/return": 1.0 + at, "eval/return_std": 5.0} for at in (0, 40_000, 200_000)]
    named = [("sac", 1), ("dppo", 0), ("sac", 0), ("awr", 0)]
    folders = [write_run(tmp_path / f"{name}{seed}", name, seed, rows) for name, seed in named]
    folders.append(write_run(tmp_path / "pretrained", "bc", 0, rows))
    assert main(["report", *map(str, folders), "--results", str(tmp_path)]) == 0
    table = read_csv(tmp_path / "algorithms.csv")
    assert [row["algorithm"] + row["seed"] for row in table] == ["dppo0", "awr0", "sac0", "sac1"]
    assert (table[0]["return_0"], table[0]["return_80000"], table[0]["return_200000"]) == ("1", "", "200001")
    assert table[0]["std_200000"] == "5"
    assert (tmp_path / "algorithms.png").stat().st_size > 10_000


def test_a_report_keeps_the_runs_that_are_not_given(tmp_path: Path) -> None:
    def report(algorithm: str, seed: int, value: float) -> list[tuple[str, str, str]]:
        rows = [{"env_steps": 0, "eval/return": value, "eval/return_std": 5.0}]
        folder = write_run(tmp_path / f"{algorithm}{seed}{value}", algorithm, seed, rows)
        assert main(["report", str(folder), "--results", str(tmp_path)]) == 0
        table = read_csv(tmp_path / "algorithms.csv")
        return [(row["algorithm"], row["seed"], row["return_0"]) for row in table]

    report("sac", 1, 1.5)
    report("dppo", 0, 2.5)
    assert report("sac", 0, 3.5) == [("dppo", "0", "2.5"), ("sac", "0", "3.5"), ("sac", "1", "1.5")]
    assert report("sac", 1, 4.5)[1:] == [("sac", "0", "3.5"), ("sac", "1", "4.5")]


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a run directory" in capsys.readouterr().err
    folder = write_run(tmp_path / "other", "bc", 0, [])
    assert main(["report", str(folder)]) == 2
    assert "algorithm.name=bc is none of dppo" in capsys.readouterr().err


def test_a_run_starts(tmp_path: Path) -> None:
    tiny = [*COMMON, *SMALL_ENV, *SMALL_DIFFUSION, "policy.checkpoint=null", "critic.mlp_dims=[8,8,8]"]
    few = ["algorithm.batch_size=4", "algorithm.n_critic_warmup_itr=0", "train.n_train_itr=1", "train.n_steps=4"]
    run = ["run", "--algorithm", "qsm", "--seed", "3", "--out", str(tmp_path / "qsm"), *tiny, *few]
    assert main(run) == 0
    assert Run.read(tmp_path / "qsm").seed == 3
