"""Draw the CSV file of `run`, `vs_reference` or `iteration`; nothing is measured here.

python -m benchmarks.plot benchmarks/results/ops.csv ops.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import read_csv
from dppo_fast.cli import guarded
from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError

Rows: TypeAlias = list[dict[str, str]]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def ops(axes: Axes, rows: Rows) -> None:
    """Median microseconds by op and shape, one bar per backend; whiskers are the 20th and 80th percentile."""
    places = list(dict.fromkeys((row["op"], row["shape"]) for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    height = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        own = [row for row in rows if row["backend"] == backend]
        y = [places.index((row["op"], row["shape"])) + (i - (len(backends) - 1) / 2) * height for row in own]
        low, mid, high = ([float(row[f"{p}_us"]) for row in own] for p in ("p20", "p50", "p80"))
        spread = [[m - x for m, x in zip(mid, low, strict=True)], [x - m for m, x in zip(mid, high, strict=True)]]
        axes.barh(y, mid, height, xerr=spread, color=COLOURS[i % len(COLOURS)], label=backend, ecolor="0.3")
    unverified = {row["op"] for row in rows if row["verified"] != "True"}
    axes.set_yticks(
        range(len(places)), [f"{op}, {shape}{' (unverified)' * (op in unverified)}" for op, shape in places]
    )
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="µs")
    axes.legend()


def versus(axes: Axes, rows: Rows) -> None:
    """How many times faster than the reference, as shipped and fixed."""
    names = [f"{row['task']}, {row['size']}" for row in rows]
    for i, (column, label) in enumerate({"ratio": "as shipped", "ratio_fix": "+fix"}.items()):
        y = [place + (i - 0.5) * 0.4 for place in range(len(rows))]
        bars = axes.barh(y, [float(row[column]) for row in rows], 0.4, color=COLOURS[i], label=label)
        axes.bar_label(bars, fmt="%.1fx", padding=3)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlabel="times faster than the reference")
    axes.legend()


def phases(axes: Axes, rows: Rows) -> None:
    """Seconds of an iteration by phase."""
    bars = axes.barh([row["phase"] for row in rows], [float(row["seconds"]) for row in rows], color=COLOURS[0])
    axes.bar_label(bars, [f"{float(row['percent']):.0f} %" for row in rows], padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=f"seconds; at most {float(rows[0]['amdahl_ceiling']):.2f}x faster without all but env")


KINDS = {"op": ops, "task": versus, "phase": phases}
"""By their first column."""


def plot(csv: Path, png: Path) -> None:
    """Raises UserError for a file that holds no measurements."""
    rows = read_csv(csv)
    kind = KINDS.get(next(iter(rows[0])) if rows else "")
    if kind is None:
        raise UserError(f"{csv}: not a CSV file of benchmarks.run, vs_reference or iteration")
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(8, 1.5 + 0.45 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        kind(axes, rows)
        first = rows[0]
        where = f"{first['device']}, {first['threads']} CPU threads, PyTorch {first['torch']}, {first['commit']}"
        axes.set_title(where, fontsize=9, loc="left")
        with atomic_write(png) as file:
            figure.savefig(file, format="png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    options = parser.parse_args(arguments)
    return guarded(lambda: plot(options.csv, options.png))


if __name__ == "__main__":
    sys.exit(main())
