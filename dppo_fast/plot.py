"""Learning curves, drawn from metrics files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dppo_fast.log.metrics import Row, read_metrics
from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError

Array: TypeAlias = NDArray[np.float64]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE: dict[Any, Any] = {
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def learning_curve(metrics: Path, png: Path) -> None:
    """Draw one run from its ``metrics.csv`` or ``metrics.jsonl``; its folder's name is the title.

    Reinforcement learning: the evaluation return, its spread (10th to 90th percentile where ``eval/return_p10`` and
    ``eval/return_p90`` are given, else one standard deviation) and the training return, over environment steps.
    Pre-training: the loss over epochs.

    Raises:
        UserError: the file is unreadable, or has none of these.
    """
    rows = read_metrics(metrics)
    training, evaluation, loss = (_curve(rows, key) for key in ("train/return", "eval/return", "loss/bc"))
    if not (training.size or evaluation.size or loss.size):
        raise UserError(f"{metrics}: no finite eval/return, train/return or loss/bc to draw")
    with _axes(png, metrics.resolve().parent.name) as axes:
        if training.size:
            axes.plot(*training, color="0.6", linewidth=1, label="training")
        if evaluation.size:
            name, spread = _spread(rows)
            axes.plot(*evaluation, color=_COLOURS[0], marker="o", markersize=3, label="evaluation")
            axes.fill_between(*spread, color=_COLOURS[0], alpha=0.15, linewidth=0, label=name)
        if training.size or evaluation.size:
            _label(axes, "return")
        else:
            axes.plot(*loss, color=_COLOURS[0])
            axes.set(xlabel="epoch", ylabel="behaviour-cloning loss", yscale="log")


def learning_curves(
    runs: Mapping[str, Sequence[Path]], png: Path, gate: float | None = None, title: str = "", key: str = "eval/return"
) -> None:
    """Compare groups of runs: ``runs`` maps a label to metrics files, usually one per seed.

    Each run is a thin line over environment steps; a group's mean is a thick one, over the steps that all of its runs
    cover. ``gate`` is a value to be reached, drawn as a level line.

    Raises:
        UserError: a file is unreadable, or has no finite ``key``.
    """
    groups = {label: [_required_curve(file, key) for file in files] for label, files in runs.items()}
    with _axes(png, title) as axes:
        for (label, curves), colour in zip(groups.items(), cycle(_COLOURS), strict=False):
            for curve in curves:
                axes.plot(*curve, color=colour, linewidth=0.8, alpha=0.5)
            count = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
            axes.plot(*_mean(curves), color=colour, linewidth=2.2, label=label + count)
        if gate is not None:
            axes.axhline(gate, color="0.3", linewidth=1, linestyle="--")
            axes.margins(y=0.1)
            axes.text(0.01, gate, f"gate {gate:,g}", transform=axes.get_yaxis_transform(), color="0.3", va="bottom")
        _label(axes, key.rpartition("/")[2].replace("_", " "))


@contextmanager
def _axes(png: Path, title: str) -> Iterator[Axes]:
    """Empty axes, written to ``png`` when the block ends."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        yield axes
        with atomic_write(png) as file:
            figure.savefig(file, format="png")


def _label(axes: Axes, quantity: str) -> None:
    axes.set(xlabel="environment steps", ylabel=quantity)
    axes.xaxis.set_major_formatter(lambda steps, _: _steps(steps))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.legend(loc="best")


def _steps(steps: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if steps >= size:
            return f"{steps / size:g} {unit}"
    return f"{steps:g}"


def _curve(rows: list[Row], key: str) -> Array:
    """Where a run has it, its steps (its epochs, if it takes none) and the values of ``key``: [2, points]."""
    return _finite(_column(rows, "env_steps", "iteration"), _column(rows, key))


def _required_curve(file: Path, key: str) -> Array:
    curve = _curve(read_metrics(file), key)
    if not curve.size:
        raise UserError(f"{file}: no finite {key} to draw")
    return curve


def _spread(rows: list[Row]) -> tuple[str | None, Array]:
    """The evaluation return's spread: its name; steps, lower and upper ends [3, points]."""
    steps = _column(rows, "env_steps", "iteration")
    percentiles = _finite(steps, _column(rows, "eval/return_p10"), _column(rows, "eval/return_p90"))
    if percentiles.size:
        return "10th to 90th percentile", percentiles
    mean, std = _column(rows, "eval/return"), _column(rows, "eval/return_std")
    deviations = _finite(steps, mean - std, mean + std)
    return "± one standard deviation" if deviations.size else None, deviations


def _mean(curves: list[Array]) -> Array:
    """The mean curve [2, points] over the steps that all ``curves`` cover, interpolated where they have no point."""
    first, last = max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves)
    steps = np.unique(np.concatenate([curve[0] for curve in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    return np.stack([steps, np.mean([np.interp(steps, *curve) for curve in curves], axis=0)])


def _column(rows: list[Row], key: str, otherwise: str | None = None) -> Array:
    return np.array([row.get(key, row[otherwise] if otherwise else np.nan) for row in rows], dtype=np.float64)


def _finite(*columns: Array) -> Array:
    table = np.stack(columns)
    return table[:, np.isfinite(table).all(0)]
