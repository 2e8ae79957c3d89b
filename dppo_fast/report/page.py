"""The page: what the runs reached, their curves, their time and health, how their settings differ, and their videos."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from dppo_fast.log.display import number
from dppo_fast.report.charts import COLOURS, Line, bar_chart, line_chart
from dppo_fast.report.runs import Array, Group, Run, differences

LEARNING = {
    "eval/return": "Evaluation return",
    "eval/success_rate": "Evaluation success rate",
    "train/return": "Training return",
    "train/success_rate": "Training success rate",
    "loss/bc": "Behaviour-cloning loss",
}
HEALTH = {
    "ppo/approx_kl": "KL divergence",
    "ppo/clip_fraction": "Clip fraction",
    "critic/explained_variance": "Explained variance",
    "train/nan_count": "NaN counter",
}
"""Metric -> title of its figure."""

NOT_DRAWN = ("iteration", "env_steps", "time/", "eval/episodes", "train/episodes")
"""Metrics, by how they start, that are what the figures are drawn over, or are shown by them otherwise."""

LOG_SCALED = ("loss/", "ppo/")

CLOCK_NAMES = {"env_steps": "environment steps", "iteration": "iteration"}

SEEDS_DRAWN = 8
"""Of a group with more, only the mean and the range."""


def render(groups: Sequence[Group], videos: int) -> str:
    """The whole page, which needs no other file; it shows the newest ``videos`` of each run."""
    runs = [run for group in groups for run in group.runs]
    steps = "env_steps" if all(run.curve("env_steps").size for run in runs) else "iteration"
    clock = "hours" if max(run.seconds[-1] for run in runs) > 3600 else "minutes"
    sections = {
        "Results": _results(groups, clock),
        "Learning": _learning(groups, steps, clock),
        "Time": _time(groups),
        "Health": _health(groups, steps),
        "Settings": _settings(groups),
        "Videos": _videos(runs, videos),
        "More metrics": _rest(groups, steps),
    }
    sections = {name: content for name, content in sections.items() if content}
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    template = Template(resources.files("dppo_fast.report").joinpath("template.html").read_text())
    return template.substitute(
        title=escape(_title(runs)),
        subtitle=_subtitle(groups, runs),
        links="".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections),
        legend="".join(_legend_entry(i, group) for i, group in enumerate(groups)),
        sections="".join(
            f'<section id="{anchors[name]}"><h2>{name}</h2>{content}</section>' for name, content in sections.items()
        ),
    )


def _title(runs: Sequence[Run]) -> str:
    """The task and the algorithm, where they are the same everywhere."""
    values = [{str(run.config.get(key)) for run in runs} - {"None"} for key in ("env.id", "algorithm.name")]
    return ", ".join(value for same in values if len(same) == 1 for value in same) or "Runs"


def _subtitle(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    if len(groups) == len(runs):
        return f"{len(runs)} run{'s' * (len(runs) > 1)}"
    curves = f"{len(groups)} curve{'s' * (len(groups) > 1)}"
    return f"{len(runs)} runs in {curves}: those that differ only by their seed are one"


def _legend_entry(index: int, group: Group) -> str:
    """A button that hides and shows the group's curves."""
    seeds = f" <small>{len(group.runs)} seeds</small>" if len(group.runs) > 1 else ""
    button = f'<button type="button" data-group="{index}" aria-pressed="true">{escape(group.label)}{seeds}</button>'
    return f'<li class="c{index % COLOURS}">{button}</li>'


def _results(groups: Sequence[Group], clock: str) -> str:
    metrics = ("eval/return", "train/return", "loss/bc")
    metric = next((key for key in metrics if any(group.curves("iteration", key) for group in groups)), "")
    best = np.min if metric == "loss/bc" else np.max
    rows = []
    for group in groups:
        values, success, steps, speed = (
            [curve[1] for curve in group.curves("iteration", key)] if key else []
            for key in (metric, "eval/success_rate", "env_steps", "steps_per_second")
        )
        rows.append(
            {
                "": escape(group.label),
                "seed": escape(", ".join(str(run.config.get("seed")) for run in group.runs)),
                "iterations": _spread([run.rows[-1]["iteration"] for run in group.runs], "{:,.0f}"),
                "env steps": _spread([own[-1] for own in steps], "{:,.0f}"),
                f"{LEARNING.get(metric, '')}, start": _spread([own[0] for own in values]),
                "end": _spread([own[-1] for own in values]),
                "best": _spread([best(own) for own in values]),
                "success, %": _spread([100 * own[-1] for own in success]),
                "steps/s": _spread([np.median(own) for own in speed]),
                clock: _spread([float(run.column(clock)[-1]) for run in group.runs]),
            }
        )
    several = "<p>Of several seeds: the mean, and from the lowest to the highest.</p>"
    return _table(rows) + several * any(len(group.runs) > 1 for group in groups)


def _learning(groups: Sequence[Group], steps: str, clock: str) -> str:
    bands = "Bands: of several seeds, from the lowest to the highest, around their mean; of one run, the 95 % interval"
    return f"{_figures(groups, LEARNING, steps, clock)}<p>{bands} of the mean over its episodes.</p>"


def _figures(groups: Sequence[Group], titles: Mapping[str, str], *clocks: str) -> str:
    """A figure for every metric that changes and every clock; a sentence for those that never do."""
    figures, constants = [], []
    for key, title in titles.items():
        values = [curve[1] for group in groups for curve in group.curves(clocks[0], key)]
        if not values:
            continue
        everything = np.concatenate(values)
        if (everything == everything[0]).all():
            constants.append(f"{title} is {number(everything[0])} throughout.")
            continue
        for clock in clocks:
            if lines := _lines(groups, clock, key):
                figures.append(line_chart(title, lines, CLOCK_NAMES.get(clock, clock), key.startswith(LOG_SCALED)))
    notes = f"<p>{escape(' '.join(constants))}</p>" if constants else ""
    return f'<div class="figures">{"".join(figures)}</div>{notes}' if figures else notes


def _lines(groups: Sequence[Group], clock: str, key: str) -> list[Line]:
    lines = []
    for i, group in enumerate(groups):
        curves = group.curves(clock, key)
        if (band := group.band(clock, key)) is not None:
            single: list[Array] = curves if 1 < len(curves) <= SEEDS_DRAWN else []
            lines.append(Line(group.label, i, band, single))
    return lines


def _time(groups: Sequence[Group]) -> str:
    phases = {}
    for group in groups:
        own = [run.phases() for run in group.runs]
        names = dict.fromkeys(name for one in own for name in one)
        phases[group.label] = {name: float(np.mean([one.get(name, 0.0) for one in own])) for name in names}
    rows = []
    for label, parts in phases.items():
        total = sum(parts.values()) or 1.0
        shares = {f"{name}, s": f"{number(x)} <small>{100 * x / total:.0f} %</small>" for name, x in parts.items()}
        rows.append({"per iteration": escape(label), **shares})
    if not any(map(any, phases.values())):
        return ""
    return bar_chart("Seconds per iteration", phases, "s") + _table(rows)


def _health(groups: Sequence[Group], steps: str) -> str:
    absent = [name for key, name in HEALTH.items() if not any(group.curves(steps, key) for group in groups)]
    note = f"<p>Not logged by these runs: {escape(', '.join(absent))}.</p>" if absent else ""
    return _figures(groups, HEALTH, steps) + note


def _settings(groups: Sequence[Group]) -> str:
    settings = [group.settings for group in groups]
    keys = differences(settings)
    shared = [{"key": escape(key), "value": _value(settings[0], key)} for key in settings[0] if key not in keys]
    rows = [
        {"key": escape(key)} | {escape(group.label): _value(group.settings, key) for group in groups} for key in keys
    ]
    same = (
        "" if len(groups) == 1 else "<p>All runs have the same settings; what tells them apart is not among them.</p>"
    )
    everything = (
        f"<details><summary>The {len(shared)} settings that all share</summary>{_table(shared, 'text')}</details>"
    )
    return (_table(rows, "text") if rows else same) + everything


def _videos(runs: Sequence[Run], count: int) -> str:
    figures = []
    for run in runs:
        for file in run.videos()[-count:] if count else []:
            name = escape(f"{run.path.name}: {file.stem}")
            data = base64.b64encode(file.read_bytes()).decode()
            figures.append(
                f'<figure><figcaption>{name}</figcaption><video controls muted loop preload="metadata" '
                f'aria-label="{name}" src="data:video/mp4;base64,{data}"></video></figure>'
            )
    return f'<div class="figures videos">{"".join(figures)}</div>' if figures else ""


def _rest(groups: Sequence[Group], steps: str) -> str:
    keys = dict.fromkeys(key for group in groups for run in group.runs for row in run.rows for key in row)
    shown = {*LEARNING, *HEALTH}
    spread = ("_std", "_p10", "_p90")
    titles = {
        key: key
        for key in sorted(keys)
        if key not in shown and not key.startswith(NOT_DRAWN) and not key.endswith(spread)
    }
    figures = _figures(groups, titles, steps)
    return f"<details><summary>{len(titles)} more metrics</summary>{figures}</details>" if figures else ""


def _table(rows: Sequence[Mapping[str, str]], kind: str = "numbers") -> str:
    """Rows of HTML by column; the first column names the row, and one without any entry is left out."""
    columns = dict.fromkeys(name for row in rows for name in row)
    first, *others = [name for name in columns if any(row.get(name) for row in rows)]
    head = "".join(f'<th scope="col">{name}</th>' for name in (first, *others))
    body = "".join(
        f'<tr><th scope="row">{row[first]}</th>{"".join(f"<td>{row.get(name, str())}</td>" for name in others)}</tr>'
        for row in rows
    )
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="table" tabindex="0">{table}</div>'


def _spread(values: Sequence[float], form: str | None = None) -> str:
    """One value, or the mean of several with the lowest and the highest."""
    if not values:
        return ""
    mean = float(np.mean(values))
    text, low, high = (form.format(x) if form else number(x, mean) for x in (mean, min(values), max(values)))
    return text if low == high else f"{text} <small>{low} to {high}</small>"


def _value(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "<small>not there</small>"
    return f"<code>{escape('null' if settings[key] is None else str(settings[key]))}</code>"
