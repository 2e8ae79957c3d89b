"""The tree is composed, not copied."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from dppo_fast.cli import config_folder

LEAST = 4
"""Lines that make a block."""

COMPOSING = ("defaults:", "- _self_")
"""Hydra wants these in every file."""


def lines(file: Path) -> list[str]:
    """What a file says, without comments."""
    every = (line.partition(" #")[0].rstrip() for line in file.read_text().splitlines())
    return [line for line in every if line and line[0] != "#" and line.strip() not in COMPOSING]


def repeated(files: list[list[str]]) -> int:
    """How many lines are in a block of at least `LEAST` that an earlier file has, too."""
    seen: set[tuple[str, ...]] = set()
    count = 0
    for file in files:
        blocks = [tuple(file[i : i + LEAST]) for i in range(len(file) - LEAST + 1)]
        count += len({i + j for i, block in enumerate(blocks) if block in seen for j in range(LEAST)})
        seen.update(blocks)
    return count


def test_less_than_15_percent_are_repeated() -> None:
    files = [lines(file) for file in sorted(config_folder().rglob("*.yaml"))]
    assert len(files) > 279
    assert repeated(files) < 0.15 * sum(map(len, files))


def test_what_counts_as_repeated() -> None:
    original, other = list("abcdefgh"), list("xyz")
    assert repeated([original, other, original[:3]]) == 0
    assert repeated([original, [*other, *original[2:7]]]) == 5
    assert repeated([original] * 3) == 16


def test_whole_runs_say_little() -> None:
    """But for which pieces they are made of; half of them nothing else."""
    folder = config_folder()
    runs = [
        lines(file) for name in ("gym", "robomimic", "furniture", "d3il") for file in folder.glob(f"{name}/**/*.yaml")
    ]
    own = [[line for line in run if not line.startswith("  - /")] for run in runs]
    assert sorted(map(len, own))[len(own) // 2] == 0
    assert len(list(chain(*own))) < 3 * len(runs)
