"""The picture of D3IL avoid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from dppo_fast.envs.avoid_task import OBSTACLES
from dppo_fast.plot_avoid import GOAL, OTHER, STOPPED, draw_trajectories

LEFT = np.array([(0.525, -0.28), (0.6, -0.1), (0.34, 0.08), (0.29, 0.26), (0.28, 0.45)])
MIDDLE = np.array([(0.525, -0.28), (0.6, -0.1), (0.34, 0.08), (0.42, 0.26)])


def test_paths_between_the_obstacles_in_the_colour_of_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    png = tmp_path / "paths.png"
    draw_trajectories({"first": [LEFT, MIDDLE, LEFT[:3]], "second": [MIDDLE]}, png, columns=2)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first, second = figures[0].axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("first", "second")
    for axes in (first, second):
        circles = [(*patch.center, patch.radius) for patch in axes.patches if isinstance(patch, Circle)]
        assert circles == list(OBSTACLES)
    assert paths(first) == {GOAL: LEFT.tolist(), OTHER: MIDDLE.tolist(), STOPPED: LEFT[:3].tolist()}
    assert paths(second) == {OTHER: MIDDLE.tolist()}


def paths(axes: Axes) -> dict[str, list[list[float]]]:
    """Colour -> points of the trajectory in it."""
    return {
        to_hex(line.get_color()): np.asarray(line.get_xydata()).tolist()
        for line in axes.lines
        if len(line.get_xydata()) > 2
    }
