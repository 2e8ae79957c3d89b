"""What runs left behind, those that differ only by their seed taken together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dppo_fast.log import read_metrics
from dppo_fast.log.metrics import Row
from dppo_fast.types import UserError

Array: TypeAlias = NDArray[np.float64]

CIRCUMSTANCES = {"seed", "logdir", "resume", "resume_from", "log"}
"""Keys, or groups of them, in which runs with the same settings may differ."""

CLOCKS = {"hours": 3600, "minutes": 60}

LABEL_LENGTH = 32


@dataclass(frozen=True)
class Run:
    """A run directory: its metrics, at least one row, and its configuration, flat, by dotted keys."""

    path: Path
    rows: list[Row]
    config: Mapping[str, Any]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration but for the run's circumstances."""
        return {key: value for key, value in self.config.items() if key.partition(".")[0] not in CIRCUMSTANCES}

    @cached_property
    def seconds(self) -> Array:
        """How long the run had taken at each row."""
        return np.cumsum([sum(x for key, x in row.items() if key.startswith("time/") and x == x) for row in self.rows])

    def column(self, key: str) -> Array:
        """A metric in every row, NaN where it has none; ``hours`` and ``minutes`` are the time that the run took."""
        if key in CLOCKS:
            return self.seconds / CLOCKS[key]
        return np.array([row.get(key, np.nan) for row in self.rows], np.float64)

    def curve(self, *keys: str) -> Array:
        """The columns ``keys`` where all are finite [keys, points]."""
        table = np.stack([self.column(key) for key in keys])
        return table[:, np.isfinite(table).all(0)]

    def phases(self) -> dict[str, float]:
        """Seconds per iteration, by phase."""
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith("time/"))
        iterations = max(1.0, self.rows[-1]["iteration"])
        return {name.removeprefix("time/"): float(np.nansum(self.column(name))) / iterations for name in names}

    def videos(self) -> list[Path]:
        """Its films, oldest first."""
        return sorted(self.path.glob("videos/*.mp4"), key=lambda file: (file.stat().st_mtime, file.name))


@dataclass(frozen=True)
class Band:
    """A group's curve, all [points]: at ``x`` the ``mean`` of its runs, and their range."""

    x: Array
    mean: Array
    low: Array
    high: Array

    def __getitem__(self, points: NDArray[np.int64]) -> Band:
        return Band(self.x[points], self.mean[points], self.low[points], self.high[points])


@dataclass(frozen=True)
class Group:
    """Runs that differ only by their seed."""

    label: str
    runs: Sequence[Run]

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def curves(self, x: str, key: str) -> list[Array]:
        """Each run's curve [2, points], of those that have one."""
        return [curve for run in self.runs if (curve := run.curve(x, key)).size]

    def band(self, x: str, key: str) -> Band | None:
        """The mean over what all curves cover, interpolated where one has no point, and the lowest and highest.

        A single run's range is the 95 % interval of the mean over the evaluation's episodes, where their number and
        standard deviation are known. None without curves, or where they do not overlap.
        """
        curves = self.curves(x, key)
        if not curves:
            return None
        if len(curves) == 1:
            steps, mean = curves[0]
            (run,) = (run for run in self.runs if run.curve(x, key).size)
            _, _, std, episodes = run.curve(x, key, f"{key}_std", f"{key.partition('/')[0]}/episodes")
            error = 1.96 * std / np.sqrt(episodes) if std.shape == mean.shape else np.zeros_like(mean)
            return Band(steps, mean, mean - error, mean + error)
        first, last = max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves)
        steps = np.unique(np.concatenate([curve[0] for curve in curves]))
        steps = steps[(steps >= first) & (steps <= last)]
        if not steps.size:
            return None
        values = np.stack([np.interp(steps, *curve) for curve in curves])
        return Band(steps, values.mean(0), values.min(0), values.max(0))


def read_run(path: Path) -> Run:
    """Raises UserError where ``path`` is no run directory, its files are damaged, or nothing has been logged yet."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run directory, it holds no config.yaml")
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise UserError(f"{path}: metrics.jsonl is empty; the run has not logged anything yet")
    try:
        config = OmegaConf.load(path / "config.yaml")
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}/config.yaml: not readable ({str(error).splitlines()[0]})") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}/config.yaml: not a configuration; restore the file")
    return Run(path, rows, dict(_flat(OmegaConf.to_container(config))))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. Runs that do not even differ by their seed are not two samples of the
    same; they go to groups of their own.
    """
    members: dict[tuple[str, int], list[Run]] = {}
    repeated: Counter[tuple[str, Any]] = Counter()
    for run in runs:
        same = (repr(sorted(run.settings.items())), run.config.get("seed"))
        members.setdefault((same[0], repeated[same]), []).append(run)
        repeated[same] += 1
    groups = list(members.values())
    labels = _labels(groups)
    return [Group(label, group) for label, group in zip(labels, groups, strict=True)]


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have the same value in all ``settings``."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What tells the groups apart: their settings where one or two differ, or else their directories."""
    settings = [group[0].settings for group in groups]
    if 1 <= len(keys := differences(settings)) <= 2:
        labels = [", ".join(f"{key.rpartition('.')[2]} {one.get(key)}" for key in keys) for one in settings]
        if len(set(labels)) == len(labels) and max(map(len, labels)) <= LABEL_LENGTH:
            return labels
    paths = [run.path.resolve() for group in groups for run in group]
    parent = os.path.commonpath([path.parent for path in paths])
    labels = []
    for group in groups:
        names = [os.path.relpath(run.path.resolve(), parent) for run in group]
        whole = ", ".join(names)
        labels.append(whole if len(whole) <= LABEL_LENGTH or len(names) == 1 else f"{names[0]} … {names[-1]}")
    return labels


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; lists are values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
