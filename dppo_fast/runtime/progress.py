"""How far a command has come: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0
"""Seconds between the lines of a log."""


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with how much of ``total`` is done. On a terminal that moves a bar, which is gone
    in the end; elsewhere it writes a line to stderr, but not more often than ``EVERY`` seconds.
    """
    if sys.stdout.isatty():
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        if (now := time.monotonic()) >= last + EVERY:
            last = now
            print(f"{name}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    yield line
