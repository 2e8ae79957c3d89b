"""The environments' speed beside gymnasium's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.environments import TASKS, main
from benchmarks.report import read_csv
from dppo_fast.envs import BACKENDS


def test_both_sides_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "environments.csv"
    assert main(["Hopper-v4", "Ant-v4", "--num-envs", "2", "--steps", "8", "--out", str(out)]) == 0
    hopper, ant = read_csv(out)
    assert hopper["task"] == "Hopper-v4"
    for clock in ("wall", "cpu"):
        ours, theirs, ratio = (float(hopper[f"{column}_{clock}"]) for column in ("ours", "async", "ratio"))
        assert ours > 0
        assert theirs > 0
        assert ratio == pytest.approx(ours / theirs, rel=0.05, abs=0.06)
        assert ant[f"async_{clock}"] == ""


def test_cpu_time_counts_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs with the workers' time left out is faster than it is."""
    task = TASKS["Hopper-v4"]
    whole = environments.theirs(task, 2, 60)
    counted = environments._cpu_seconds
    monkeypatch.setattr(environments, "_cpu_seconds", lambda workers: counted([]))
    own = environments.theirs(task, 2, 60)
    assert whole is not None
    assert own is not None
    assert whole["cpu"] < 0.9 * own["cpu"]


def test_its_tasks_are_ours() -> None:
    known = {task for name in ("kitchen", "envpool", "robomimic") for task in BACKENDS[name].load().task_ids()}
    assert set(TASKS) <= known
