"""What a run shows: its progress as a live panel or as lines, and the table it ends with."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dppo_fast.log.metrics import Row

_BLOCKS = (
    (("env steps", "env_steps"), ("steps/s", "steps_per_second")),
    (("return", "train/return"), ("evaluation", "eval/return"), ("BC loss", "loss/bc")),
    (("success", "train/success_rate"), ("KL", "ppo/approx_kl"), ("clipped", "ppo/clip_fraction")),
)
_PERCENT = ("train/success_rate", "ppo/clip_fraction")
_CURVES = ("train/return", "eval/return", "loss/bc")
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_WIDTH = 100


class Progress:
    """The state of a run, drawn as a panel by rich or as a line.

    Another thread draws the panel, so a dict that it walks through is replaced, never grown.
    """

    def __init__(self, name: str, total: int, resumed: list[Row]) -> None:
        self.phase = ""
        self._name, self._total, self._done = name, total, 0
        self._latest: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._curves: dict[str, list[float]] = {key: [] for key in _CURVES}
        for row in resumed:
            self._read(row)
        self._ends: deque[float] = deque(maxlen=50)
        self._start = time.monotonic()

    def update(self, row: Row) -> None:
        self._read(row)
        self._ends.append(time.monotonic())

    def line(self) -> str:
        """The state in one line, for logs."""
        known = [(label, key) for block in _BLOCKS for label, key in block if key in self._latest]
        figures = [f"{label} {self._figure(key)}" for label, key in known if not key.startswith("ppo/")]
        return "  ".join([f"[{self._done:{len(str(self._total))}}/{self._total}]", *figures, f"ETA {self._eta()}"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDTH)
        parts = [self._bar()]
        if self._latest:
            parts += [Text(), self._figures(curve_width=min(16, max(0, width - 64) // 2))]
        if self._seconds:
            parts += [Text(), self._time(bar_width=min(24, max(0, width - 70)))]
        yield Panel(
            Group(*parts),
            title=Text(self._name, "bold"),
            title_align="left",
            subtitle=Text(self.phase, "cyan") if self.phase else None,
            subtitle_align="right",
            border_style="grey50",
            width=width,
        )

    def _read(self, row: Row) -> None:
        values = {key: value for key, value in row.items() if math.isfinite(value)}
        phases = {key.removeprefix("time/"): value for key, value in values.items() if key.startswith("time/")}
        self._latest = self._latest | values
        self._seconds = self._seconds | {key: self._seconds.get(key, 0.0) + phases[key] for key in phases}
        for key in self._curves.keys() & values.keys():
            self._curves[key].append(values[key])
        self._done = int(values["iteration"])

    def _bar(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        elapsed = _clock(time.monotonic() - self._start)
        grid.add_row(
            Text.assemble(("iteration ", "dim"), (f"{self._done}", "bold"), (f"/{self._total}", "dim")),
            ProgressBar(self._total, self._done, style="grey30", complete_style="cyan", finished_style="green"),
            Text.assemble((elapsed, "bold"), (" elapsed   ", "dim"), (self._eta(), "bold"), (" left", "dim")),
        )
        return grid

    def _figures(self, curve_width: int) -> RenderableType:
        """Names and last values in blocks, beside them the curves of those that have one."""
        grid = Table.grid(padding=(0, 3), expand=True)
        cells = []
        for block in _BLOCKS:
            known = [(label, key) for label, key in block if key in self._latest]
            if not known:
                continue
            cell = Table.grid(padding=(0, 1))
            for label, key in known:
                curve = [Text(_sparkline(self._curves[key], curve_width), "cyan")] if key in _CURVES else []
                cell.add_row(Text(label, "dim"), Text(self._figure(key), "bold", justify="right"), *curve)
            grid.add_column()
            cells.append(cell)
        grid.add_row(*cells)
        return grid

    def _time(self, bar_width: int) -> RenderableType:
        """A bar of the phases' shares of the time, and its legend."""
        total = sum(self._seconds.values()) or 1.0
        bar, legend, start = Text(), Text(), 0.0
        for (phase, seconds), colour in zip(self._seconds.items(), cycle(_COLOURS), strict=False):
            share = seconds / total
            bar.append("━" * (round(bar_width * (start + share)) - round(bar_width * start)), colour)
            legend.append("■ ", colour).append(f"{phase} ", "dim").append(f"{100 * share:.0f} %  ")
            start += share
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Text("time", "dim"), bar, legend)
        return grid

    def _figure(self, key: str) -> str:
        value = self._latest[key]
        if key in ("env_steps", "steps_per_second"):
            return f"{value:,.0f}"
        if key in _PERCENT:
            return f"{100 * value:.1f} %"
        return _plus_minus(value, self._latest.get(f"{key}_std"))

    def _eta(self) -> str:
        """Time left, from the wall-clock time of the last iterations."""
        if len(self._ends) < 2:
            return "-:--"
        seconds_each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return _clock(max(0.0, self._ends[-1] + seconds_each * (self._total - self._done) - time.monotonic()))


def print_summary(
    before: Mapping[str, float],
    after: Mapping[str, float],
    artifacts: Mapping[str, Path],
    console: Console | None = None,
) -> None:
    """Print the evaluations before and after a run, then its artifacts' paths, each whole on one line.

    ``before`` and ``after`` have the names of a metrics row: ``eval/return``, ``eval/return_std``, ``eval/episodes``
    and, where they are known, ``eval/episode_length`` and ``eval/success_rate``.
    """
    console = console or Console(highlight=False)
    table = Table("evaluation", box=SIMPLE_HEAD)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    table.add_column("change", justify="right")
    for label, key in (("return", "eval/return"), ("episode length", "eval/episode_length")):
        if key in before and key in after:
            change = after[key] - before[key]
            cells = [_plus_minus(row[key], row.get(f"{key}_std")) for row in (before, after)]
            table.add_row(label, *cells, f"{'+' if change > 0 else ''}{number(change)}")
    if "eval/success_rate" in before and "eval/success_rate" in after:
        rates = [100 * row["eval/success_rate"] for row in (before, after)]
        table.add_row("success rate", *(f"{rate:.1f} %" for rate in rates), f"{rates[1] - rates[0]:+.1f} %")
    table.add_row("episodes", *(f"{row['eval/episodes']:.0f}" for row in (before, after)))
    console.print(table)
    width = max(map(len, artifacts), default=0)
    for name, path in artifacts.items():
        console.print(f"  {name:{width}}  {path}", markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number(value: float, scale: float | None = None) -> str:
    """Three or four digits of ``value``, or as many decimals as a number of size ``scale`` would get."""
    size = abs(value if scale is None else scale)
    if size == 0 or 1e-3 <= size < 1e7:
        decimals = 0 if size >= 1000 or size == 0 else 2 - math.floor(math.log10(size))
        return f"{value:,.{decimals}f}"
    return f"{value:.2e}"


def _plus_minus(mean: float, std: float | None) -> str:
    return number(mean) if std is None else f"{number(mean)} ± {number(std, scale=mean)}"


def _sparkline(values: list[float], width: int) -> str:
    """``width`` values, evenly spaced and ending with the last, as bars of eight heights."""
    count = len(values)
    width = min(width, count)
    points = [values[(i + 1) * count // width - 1] for i in range(width)]
    low, high = (min(points), max(points)) if points else (0.0, 0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (point - low) / (high - low or 1))] for point in points)
