"""The study of exploration on D3IL avoid: what it measures, and that its commands run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.avoid import METHODS, Episodes, main
from benchmarks.report import read_csv
from tests.runs import COMMON

UP = np.linspace(-0.28, 0.45, 100)


def episode(x: float, lost: int | None = None, gain: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Straight up at ``x``, full reward for the last 5 steps, or lost from a step on."""
    reward = np.where(np.arange(100) < 95, 1.0, gain)
    if lost is not None:
        reward[lost:] = -0.1
    return np.stack((np.full(100, x), UP), 1), reward


def test_what_is_measured() -> None:
    paths, rewards = zip(
        episode(0.3),
        episode(0.3, gain=1.9),
        episode(0.3, lost=60),
        episode(0.6, gain=1),
        episode(0.3, lost=0),
        strict=True,
    )
    rewards[0][50:60] = -0.1  # off the table, and back
    episodes = Episodes(np.stack(paths), np.stack(rewards))
    assert [len(path) for path in episodes.until_lost] == [100, 100, 60, 100, 1]
    assert episodes.success(4, 2) == pytest.approx(0.2)
    assert episodes.success(4, 1) == pytest.approx(0.8)
    assert episodes.within([(0, 2, 5)]) == pytest.approx(0.4)
    assert episodes.within([(0, 2, 5), (1, 4, 7)]) == pytest.approx(0.6)


def test_the_study_runs(tmp_path: Path) -> None:
    small = [
        *COMMON,
        "env.num_threads=1",
        "env.num_envs=2",
        "policy.network.mlp_dims=[8,8,8]",
        "algorithm.batch_size=50",
        "train.n_train_itr=1",
        "train.val_freq=0",
    ]
    out = tmp_path / "runs"
    assert main(["run", "--out", str(out), *small]) == 0
    assert main(["report", str(out), str(out), "--results", str(tmp_path), "--episodes", "2"]) == 0
    rows = read_csv(tmp_path / "avoid_m1.csv")
    expected = [(title, "42", policy) for policy in ("pre-trained", "fine-tuned") for title in METHODS.values()]
    assert [(row["method"], row["seed"], row["policy"]) for row in rows] == [*expected, *expected]
    assert rows[:6] == rows[6:]
    assert [row["env_steps"] for row in rows[:6]] == ["0"] * 3 + ["200"] * 3
    assert all(0 <= float(row["success"]) <= 1 for row in rows)
    assert (tmp_path / "avoid_m1.png").stat().st_size > 10_000
