"""D3IL avoid from above: trajectories of the rod between the obstacles, as in the paper's study of exploration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import NDArray

from dppo_fast.envs.avoid_task import FINISH_Y, GOAL_SIDE, LINE_Y, OBSTACLES, START, TABLE_X, sides_of
from dppo_fast.runtime.files import atomic_write

GOAL, OTHER, STOPPED = "#0072b2", "#56b4e9", "#d55e00"
"""Colours of trajectories: through the last line on the goal's side, on another, or not through it."""


def draw_trajectories(panels: Mapping[str, Sequence[NDArray[Any]]], png: Path, columns: int = 3) -> None:
    """Draw a panel for each title, with the rod's paths [L, 2] in metres, which may differ in length."""
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(2.6 * columns, 3.4 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        for (title, paths), axes in zip(panels.items(), figure.axes, strict=False):
            axes.set_title(title)
            _table(axes)
            for path in paths:
                axes.plot(*np.asarray(path).T, color=_colour(path), linewidth=0.7, alpha=0.6)
                axes.plot(*path[-1], color=_colour(path), marker=".", markersize=3)
        with atomic_write(png) as file:
            figure.savefig(file, format="png", dpi=150)


def _table(axes: Axes) -> None:
    for x, y, radius in OBSTACLES:
        axes.add_patch(Circle((x, y), radius, color="0.35", linewidth=0))
    axes.plot(TABLE_X, (FINISH_Y, FINISH_Y), color="0.35", linewidth=1, linestyle="--")
    axes.plot(*START, color="black", marker="o", markersize=4)
    for edge in TABLE_X:
        axes.axvline(edge, color="0.8", linewidth=1)
    axes.set(xlim=(TABLE_X[0] - 0.05, TABLE_X[1] + 0.05), ylim=(START[1] - 0.03, 0.52), aspect="equal")


def _colour(path: NDArray[Any]) -> str:
    sides = sides_of(path)
    return STOPPED if len(sides) < len(LINE_Y) else GOAL if GOAL_SIDE in sides else OTHER
