from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dppo_fast.data.inspect import main
from tests.data.conversions import npz
from tests.data.test_trajectories import arrays


def shown(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main([str(path), *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_shapes_ranges_lengths_and_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = arrays([3, 5, 5]) | {"rewards": np.array([0] * 3 + [1] * 5 + [2] * 5), "terminals": np.arange(13) == 2}
    data["images"] = np.zeros((13, 6, 20, 30), np.uint8)
    npz(tmp_path / "train.npz", data)
    text = shown(tmp_path / "train.npz", capsys)
    for line in (
        rf"states        float32  [13, 3]                from {data['states'].min():.6g} to {data['states'].max():.6g}",
        "images        uint8    [13, 6, 20, 30]        on disk",
        "episodes 3  steps 13  length_mean 4.33333  return_mean 5",
        "lengths from 3 to 5; of 3, 1 end in a terminal state",
        f"       6.667 to 10         {'█' * 40} 1",
    ):
        assert line in text, text
    assert "warning" not in text
    picture = np.asarray(Image.open(tmp_path / "train.png").convert("RGB"))
    assert picture.shape[0] > 600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert (picture.reshape(-1, 3) == 0).all(1).sum() > 10_000  # the images are black


def test_the_picture_s_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {key: value for key, value in arrays([3, 5]).items() if key in ("states", "actions", "traj_lengths")}
    npz(tmp_path / "train.npz", data)
    text = shown(tmp_path / "train.npz", capsys, f"png={tmp_path / 'other.png'}")
    assert "of 2, ends unknown" in text
    assert "returns" not in text
    assert {file.name for file in tmp_path.iterdir()} == {"train.npz", "other.png"}
    error = shown(tmp_path / "train.npz", capsys, f"png={tmp_path}/absent/x.png", code=2)
    assert "x.png is not writable (No such file or directory)" in error


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"states": np.where(np.arange(24).reshape(8, 3) == 4, np.nan, 0.5)},
            "states has NaN or Inf in 1 of 8 rows, in dims [1]",
        ),
        (
            {"states": np.where(np.arange(24).reshape(8, 3) == 4, np.nan, 0.5)},
            "training refuses this file: states has NaN",
        ),
        ({"actions": np.full((8, 2), np.inf)}, "actions has NaN or Inf in 8 of 8 rows, in dims [0, 1]"),
        ({"actions": np.stack([np.arange(8) / 8, np.ones(8)], 1)}, "actions never changes in dims [1]"),
        (
            {"actions": np.stack([np.arange(8) / 4, np.arange(8) / 8], 1)},
            "actions leave [-1, 1] in 3 of 8 rows, in dims [0]",
        ),
        ({"traj_lengths": np.array([3, 4])}, "training refuses this file: traj_lengths adds up to 7"),
    ],
)
def test_it_warns(changes: dict[str, Any], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz(tmp_path / "train.npz", arrays([3, 5]) | changes)
    assert f"warning: {warning}" in shown(tmp_path / "train.npz", capsys)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in shown(tmp_path / "absent.npz", capsys, code=2)
    (tmp_path / "train.pkl").write_bytes(b"")
    assert "python -m dppo_fast.data.convert reference" in shown(tmp_path / "train.pkl", capsys, code=2)
    assert main([]) == 2
    assert "file is missing" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "png: null" in capsys.readouterr().out
