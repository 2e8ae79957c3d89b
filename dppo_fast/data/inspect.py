"""python -m dppo_fast.data.inspect <npz> [png=<file>]: what is in demonstrations, and what is wrong with them.

Prints shapes, ranges, lengths and returns, warns about what training would stumble over, and draws a picture, by
default beside the data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.data.trajectories import Trajectories, read_arrays
from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]

FRAMES = 6
"""How many images the picture shows."""


@dataclass
class InspectConfig:
    file: str = MISSING
    png: str | None = None


def inspect(config: InspectConfig) -> list[str]:
    """Print, draw, and return the warnings. Raises UserError where the file is no data at all."""
    path = Path(config.file)
    try:
        arrays = read_arrays(path)
    except UserError as error:
        raise UserError(f"file={path}: {error}") from error
    for key, array in arrays.items():
        print(f"{key:<13} {array.dtype!s:<8} {list(array.shape)!s:<22} {_ranges(key, array)}")
    warnings = list(faults(arrays))
    trajectories = None
    try:
        trajectories = Trajectories(**arrays)
    except UserError as error:
        warnings.append(f"training refuses this file: {error}")
    for warning in warnings:
        print(f"warning: {warning}")
    if trajectories is not None:
        summarize(trajectories)
        png = path.with_suffix(".png") if config.png is None else Path(config.png)
        try:
            draw(trajectories, path.name, png)
        except OSError as error:
            raise UserError(f"png={png} is not writable ({error.strerror}); choose another file") from error
        print(f"  {png}")
    return warnings


def summarize(trajectories: Trajectories) -> None:
    """Print lengths, ends, and returns."""
    print("  ".join(f"{name} {value:.6g}" for name, value in trajectories.describe().items()))
    lengths, terminals = trajectories.traj_lengths, trajectories.terminals
    ends = "ends unknown" if terminals is None else f"{terminals[lengths.cumsum() - 1].sum()} end in a terminal state"
    print(f"lengths from {lengths.min()} to {lengths.max()}; of {len(lengths)}, {ends}")
    if (returns := trajectories.returns) is not None:
        print("returns", *_histogram(returns), sep="\n")


def faults(arrays: Mapping[str, Array]) -> Iterator[str]:
    """What is wrong with the values, one line each."""
    for key in ("states", "actions"):
        array = arrays[key]
        if array.ndim != 2 or array.dtype.kind not in "biuf" or not len(array):
            continue  # `Trajectories` says more about it
        broken = ~np.isfinite(array)
        if broken.any():
            columns = np.flatnonzero(broken.any(0)).tolist()
            yield f"{key} has NaN or Inf in {broken.any(1).sum()} of {len(array)} rows, in dims {columns}"
        with np.errstate(invalid="ignore"):
            low, high = array.min(0), array.max(0)
        if constant := np.flatnonzero(low == high).tolist():
            yield f"{key} never changes in dims {constant}, from which a policy learns nothing"
        outside = np.flatnonzero((low < -1.001) | (high > 1.001)).tolist()
        if key == "actions" and outside:
            rows = (np.abs(array) > 1.001).any(1).sum()
            yield f"actions leave [-1, 1] in {rows} of {len(array)} rows, in dims {outside}; normalise them"


def draw(trajectories: Trajectories, title: str, png: Path) -> None:
    """Lengths, returns, the distribution of every dim, and some images."""
    import matplotlib
    from matplotlib.figure import Figure

    images, returns = trajectories.images, trajectories.returns
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 8 if images is not None else 6), layout="constrained", dpi=120)
        figure.suptitle(title, weight="bold")
        grid = figure.add_gridspec(2 if images is None else 3, 2)
        lengths, other = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        lengths.hist(trajectories.traj_lengths, bins=30, color="#0072b2")
        lengths.set(xlabel="steps", ylabel="trajectories")
        if returns is None:
            other.text(0.5, 0.5, "no rewards", ha="center", va="center", color="0.5")
            other.set_axis_off()
        else:
            other.hist(returns, bins=30, color="#009e73")
            other.set(xlabel="return", ylabel="trajectories")
        _draw_dims(figure.add_subplot(grid[1, 0]), trajectories.states, "states")
        _draw_dims(figure.add_subplot(grid[1, 1]), trajectories.actions, "actions")
        if images is not None:
            chosen = np.linspace(0, len(images) - 1, FRAMES).astype(int)
            axes = figure.add_subplot(grid[2, :])
            axes.imshow(np.concatenate([_picture(images[row]) for row in chosen], 1))
            axes.set_title(f"steps {', '.join(map(str, chosen))}; cameras one above the other", fontsize=9)
            axes.set_axis_off()
        with atomic_write(png) as file:
            figure.savefig(file, format="png")


def _draw_dims(axes: Axes, values: Array, name: str) -> None:
    """Range, 5th to 95th percentile and median of every dim."""
    low, q05, middle, q95, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1], axis=0)
    dims = np.arange(len(low))
    axes.vlines(dims, low, high, color="0.75", linewidth=1)
    axes.vlines(dims, q05, q95, color="#0072b2", linewidth=4)
    axes.plot(dims, middle, "o", color="white", markeredgecolor="#0072b2", markersize=4)
    axes.axhspan(-1, 1, color="0.95", zorder=0)
    axes.set(xlabel=f"dim of {name}", ylabel="range, 5-95 %, median")


def _picture(image: Array) -> Array:
    """[C, H, W] as RGB, the cameras, of three channels each, one above the other; other channels in grey."""
    channels, height, width = image.shape
    if channels % 3:
        return np.repeat(image.reshape(channels * height, width, 1), 3, -1)
    return image.reshape(-1, 3, height, width).transpose(0, 2, 3, 1).reshape(-1, width, 3)


def _ranges(key: str, array: Array) -> str:
    if key == "images":
        return "on disk" if isinstance(array, np.memmap) else "compressed: training loads them all"
    if array.dtype.kind not in "biuf" or not array.size:
        return ""
    values = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    return f"from {values.min():.6g} to {values.max():.6g}" if values.size else "no finite number"


def _histogram(values: Array, bins: int = 10, width: int = 40) -> Iterator[str]:
    """A bar of text per bin."""
    counts, edges = np.histogram(values, min(bins, max(len(np.unique(values)), 1)))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        yield f"  {low:>10.4g} to {high:<10.4g} {'█' * -(-count * width // counts.max()):<{width}} {count}"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    named = [f"file={argument}" if "=" not in argument and argument[0] != "-" else argument for argument in arguments]
    return command_main(InspectConfig, inspect, named, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
