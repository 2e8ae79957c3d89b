"""Learning curves from metrics files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dppo_fast.plot import learning_curve, learning_curves
from dppo_fast.types import UserError


def write(path: Path, rows: Sequence[Mapping[str, float | None]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is drawn."""
    axes: list[Axes] = []
    add_subplot = Figure.add_subplot

    def record(self: Figure) -> Axes:
        axes.append(add_subplot(self))
        return axes[-1]

    monkeypatch.setattr(Figure, "add_subplot", record)
    return axes


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_returns_over_steps_with_their_spread(tmp_path: Path, drawn: list[Axes]) -> None:
    rows = [
        {"iteration": 0, "env_steps": 100, "train/return": None, "eval/return": 1.0, "eval/return_std": 0.5},
        {"iteration": 1, "env_steps": 200, "train/return": 3.0},
        {"iteration": 2, "env_steps": 300, "train/return": 4.0, "eval/return": 7.0, "eval/return_std": 2.0},
    ]
    metrics = write(tmp_path / "hopper" / "metrics.jsonl", rows)
    learning_curve(metrics, tmp_path / "curve.png")
    assert is_png(tmp_path / "curve.png")
    axes = drawn[0]
    training, evaluation = axes.lines
    np.testing.assert_array_equal(training.get_xydata(), [[200, 3], [300, 4]])
    np.testing.assert_array_equal(evaluation.get_xydata(), [[100, 1], [300, 7]])
    band = axes.collections[0].get_paths()[0].vertices
    assert {(100, 0.5), (100, 1.5), (300, 5), (300, 9)} <= set(map(tuple, band))
    assert axes.get_title(loc="left") == "hopper"


def test_percentiles_come_before_the_standard_deviation(tmp_path: Path, drawn: list[Axes]) -> None:
    row = {"env_steps": 100, "eval/return": 1.0, "eval/return_std": 0.5, "eval/return_p10": 0.0, "eval/return_p90": 3.0}
    rows = [{"iteration": 0, **row}, {"iteration": 1, **row, "env_steps": 200}]
    learning_curve(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curve.png")
    band = drawn[0].collections[0].get_paths()[0].vertices
    assert set(band[:, 1]) == {0.0, 3.0}


def test_loss_over_epochs_from_a_csv(tmp_path: Path, drawn: list[Axes]) -> None:
    (tmp_path / "metrics.csv").write_text("iteration,loss/bc,lr/actor\n0,1.0,\n1,0.1,0.5\n2,0.")
    learning_curve(tmp_path / "metrics.csv", tmp_path / "curve.png")
    np.testing.assert_array_equal(drawn[0].lines[0].get_xydata(), [[0, 1], [1, 0.1]])
    assert drawn[0].get_yscale() == "log"
    assert drawn[0].get_xlabel() == "epoch"


def test_the_mean_of_seeds_covers_what_all_cover(tmp_path: Path, drawn: list[Axes]) -> None:
    def run(seed: int, steps: list[int]) -> Path:
        rows = [{"iteration": i, "env_steps": s, "eval/return": s + 10.0 * seed} for i, s in enumerate(steps)]
        return write(tmp_path / f"seed{seed}" / "metrics.jsonl", rows)

    runs = {"dppo": [run(0, [100, 200, 400]), run(2, [150, 200, 300])], "control": [run(4, [100, 200])]}
    learning_curves(runs, tmp_path / "curves.png", gate=250.0, title="Hopper")
    assert is_png(tmp_path / "curves.png")
    _, _, mean, single, single_mean, gate = drawn[0].lines
    np.testing.assert_allclose(mean.get_xydata(), [[150, 160], [200, 210], [300, 310]])
    np.testing.assert_array_equal(single.get_xydata(), single_mean.get_xydata())
    assert list(gate.get_ydata()) == [250.0, 250.0]
    assert mean.get_label() == "dppo (2 seeds)"


def test_another_quantity_and_its_gate(tmp_path: Path, drawn: list[Axes]) -> None:
    rows = [{"iteration": i, "env_steps": 10 * i, "eval/success_rate": 0.5 * i, "eval/return": 7.0} for i in range(3)]
    metrics = write(tmp_path / "metrics.jsonl", rows)
    learning_curves({"dppo": [metrics]}, tmp_path / "curve.png", gate=0.95, key="eval/success_rate")
    np.testing.assert_array_equal(drawn[0].lines[0].get_xydata(), [[0, 0], [10, 0.5], [20, 1]])
    assert drawn[0].get_ylabel() == "success rate"
    assert drawn[0].texts[0].get_text() == "gate 0.95"


def test_nothing_to_draw_is_an_error_naming_the_file(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [{"iteration": 0, "lr/actor": 1.0}])
    with pytest.raises(UserError, match=r"metrics\.jsonl: no finite eval/return, train/return or loss/bc"):
        learning_curve(metrics, tmp_path / "curve.png")
    with pytest.raises(UserError, match=r"metrics\.jsonl: no finite eval/return"):
        learning_curves({"a": [metrics]}, tmp_path / "curve.png")
    with pytest.raises(UserError, match=r"missing\.csv: cannot read"):
        learning_curve(tmp_path / "missing.csv", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
