"""python -m dppo_fast.report <run> [<run> ...] [out=report.html] [videos=4]: runs compared on one web page.

The page needs no other file and no network. Runs that differ only by their seed are one curve with a band; videos= is
how many of each run's newest it shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.types import UserError, require_ranges


@dataclass
class ReportConfig:
    runs: list[str] = MISSING
    out: str = "report.html"
    videos: int = 4

    def __post_init__(self) -> None:
        require_ranges(self, "", {"videos": "[0, inf)"})
        if not self.runs:
            raise UserError("runs=[] names none; give the directories of runs")


def report(config: ReportConfig) -> None:
    """Read the runs, write the page and print its path and size."""
    from dppo_fast.publish import writing
    from dppo_fast.report.page import render
    from dppo_fast.report.runs import group_runs, read_run
    from dppo_fast.runtime.files import atomic_write

    paths = dict.fromkeys(Path(run).resolve() for run in config.runs)
    page = render(group_runs([read_run(path) for path in paths]), config.videos)
    with writing(config.out) as out, atomic_write(out) as file:
        file.write(page.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [argument for argument in arguments if argument.startswith(("out=", "videos=", "runs=", "-"))]
    runs = [argument for argument in arguments if argument not in flags]
    return command_main(ReportConfig, report, [*([f"runs={runs}"] if runs else []), *flags], __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
