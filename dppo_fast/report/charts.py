"""Figures as inline SVG: their colours are the page's, whose script reads out the values under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dppo_fast.log.display import number
from dppo_fast.report.runs import Array, Band

WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 42
"""What surrounds the plot, in the drawing's units."""

BAR, GAP = 26, 12

COLOURS = 8
"""How many the page defines."""

FIRST_PART = 4
"""The colour of a bar's first part; those before are the first groups'."""

MARKED_POINTS = 20
"""A curve with more points has no markers."""

DRAWN_POINTS = 600
"""Of a curve with more, the lowest and the highest of every few are drawn."""


@dataclass(frozen=True)
class Line:
    """A group's curve in the colour number ``colour``; ``single`` are those of its runs [2, points]."""

    label: str
    colour: int
    band: Band
    single: Sequence[Array] = ()


class Axis:
    """From values to the drawing's units between ``start`` and ``end``, with round ticks inside."""

    def __init__(self, values: Array, start: float, end: float, margin: float = 0.0, log: bool = False) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = self._scaled([values.min(), values.max()])
        spread = margin * (high - low) if high > low else 0.5 * (abs(high) or 1.0)
        self.low, self.high = low - spread, high + spread
        self.ticks = [10.0**tick for tick in _ticks(self.low, self.high, 1.0)] if log else _ticks(self.low, self.high)

    def __call__(self, values: ArrayLike) -> Array:
        share: Array = (self._scaled(values) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def _scaled(self, values: ArrayLike) -> Array:
        result: Array = np.log10(values) if self.log else np.asarray(values, np.float64)
        return result


def line_chart(title: str, lines: Sequence[Line], x_label: str, log: bool = False) -> str:
    """The curves of at least one line; with ``log``, on a log scale where they are positive and span two decades."""
    curves = [own for line in lines for own in line.single]
    curves += [np.stack((line.band.x, edge)) for line in lines for edge in (line.band.low, line.band.high)]
    steps, values = np.concatenate(curves, 1)
    log = log and bool(values.min() > 0 and values.max() >= 100 * values.min())
    x, y = Axis(steps, LEFT, WIDTH - RIGHT), Axis(values, HEIGHT - BOTTOM, TOP, 0.04, log)
    body, readings = [_grid(x, y, x_label)], []
    for line in lines:
        drawn = line.band[_drawn(line.band.mean)]
        body += [
            f'<g class="curve {_colour(line.colour)}" data-group="{line.colour}">',
            *_curve(line, drawn, x, y),
            "</g>",
        ]
        points = zip(x(drawn.x), y(drawn.mean), drawn.x, map(_reading, drawn.mean, drawn.low, drawn.high), strict=True)
        rounded = [[round(px, 1), round(py, 1), short(step), text] for px, py, step, text in points]
        readings.append({"label": line.label, "group": line.colour, "points": rounded})
    data = json.dumps({"x": x_label, "lines": readings}).replace("</", "<\\/")
    body.append(f'<g class="pointer"></g><script type="application/json">{data}</script>')
    scale = ", log scale" * log
    ends = [f"{line.label} from {number(line.band.mean[0])} to {number(line.band.mean[-1])}" for line in lines]
    described = f"{title} over {x_label}{scale}: {'; '.join(ends)}"
    return _figure("chart", title, f"over {x_label}{scale}", described, HEIGHT, body)


def bar_chart(title: str, rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """One bar per row, stacked of its parts; the parts have the same colours in all."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    totals = {label: sum(row.values()) for label, row in rows.items()}
    longest, body = max(totals.values()) or 1.0, []
    for i, (label, row) in enumerate(rows.items()):
        top, left = i * (2 * BAR + GAP), 0.0
        body.append(f'<text class="name" x="0" y="{top + 14}">{escape(label)}</text>')
        body.append(f'<text x="{WIDTH}" y="{top + 14}" text-anchor="end">{number(totals[label])} {unit}</text>')
        for part, value in row.items():
            width, colour = value / longest * WIDTH, _colour(FIRST_PART + parts.index(part))
            hint = escape(f"{label}: {part} {number(value)} {unit}")
            place = f'x="{left:.1f}" y="{top + BAR - 4}" width="{width:.1f}" height="{BAR}"'
            body.append(f'<rect class="{colour}" {place}><title>{hint}</title></rect>')
            left += width
    sums = (f"{label} " + ", ".join(f"{part} {number(x)}" for part, x in row.items()) for label, row in rows.items())
    legend = "".join(f'<li class="{_colour(i)}">{escape(part)}</li>' for i, part in enumerate(parts, FIRST_PART))
    height = len(rows) * (2 * BAR + GAP)
    return _figure("bars", title, "", f"{title}: {'; '.join(sums)}", height, body) + f'<ul class="parts">{legend}</ul>'


def short(value: float) -> str:
    """A number of few characters: 80 k, 1.28 M, 2.5e-4."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10.0**power:.3g}e{power}"


def _figure(kind: str, title: str, note: str, described: str, height: int, body: Sequence[str]) -> str:
    """``described`` is what a screen reader says of the drawing."""
    return (
        f'<figure class="{kind}"><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(described)}">{"".join(body)}</svg>'
        "</figure>"
    )


def _grid(x: Axis, y: Axis, x_label: str) -> str:
    parts, bottom, center = [], HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    for tick, at in zip(y.ticks, y(y.ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT},{at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick, at in zip(x.ticks, x(x.ticks), strict=True):
        parts.append(f'<path class="axis" d="M{at:.1f},{bottom}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{center}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _curve(line: Line, drawn: Band, x: Axis, y: Axis) -> Iterator[str]:
    """The range, the runs, the mean."""
    steps, mean, low, high = x(drawn.x), y(drawn.mean), y(drawn.low), y(drawn.high)
    if (low != high).any():
        yield f'<path class="band" d="{_path([*steps, *steps[::-1]], [*low, *high[::-1]])}Z"/>'
    for own in line.single:
        kept = own[:, _drawn(own[1])]
        yield f'<path class="single" d="{_path(x(kept[0]), y(kept[1]))}"/>'
    yield f'<path class="line" d="{_path(steps, mean)}"/>'
    if len(steps) <= MARKED_POINTS:
        yield from (f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py in zip(steps, mean, strict=True))


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """At most seven multiples of 1, 2 or 5 times a power of ten, and of ``least``, between ``low`` and ``high``."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(least, next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _drawn(values: Array) -> NDArray[np.int64]:
    """The indices of the points to draw."""
    parts = np.array_split(np.arange(len(values)), min(len(values), DRAWN_POINTS // 2))
    ends = [[part[values[part].argmin()], part[values[part].argmax()]] for part in parts]
    return np.arange(len(values)) if len(values) <= DRAWN_POINTS else np.unique(ends)


def _path(x: Sequence[float] | Array, y: Sequence[float] | Array) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in zip(x, y, strict=True))


def _reading(mean: float, low: float, high: float) -> str:
    text = number(mean)
    return text if low == high else f"{text} ({number(low, mean)} to {number(high, mean)})"


def _colour(index: int) -> str:
    return f"c{index % COLOURS}"
