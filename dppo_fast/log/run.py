"""The log of one run, to which the trainer hands a row per iteration."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live

from dppo_fast.log.display import Progress
from dppo_fast.log.metrics import MetricsFiles
from dppo_fast.types import UserError


class RunLog:
    """The log of one run; use it as a context manager.

    ``directory`` gets

    - ``metrics.jsonl``: one row per iteration, written at once and never twice. A number that is not finite is
      ``null``, for which JSON has no other word. Wall-clock values are named ``time/<phase>`` (seconds) and
      ``steps_per_second``; but for these, two equal runs have equal files.
    - ``metrics.csv``: the same rows under the union of their columns; a cell is empty where a row has no finite number.
    - ``tensorboard/``: event files, at step ``env_steps`` where a row has it, else ``iteration``.

    The terminal shows a live panel; where output is no terminal, or with ``live=False``, one line per iteration.

    Args:
        total_iterations: iterations of the whole run, also of a resumed one.
        resume_iteration: the next row of the run in ``directory``; rows from it on are cut off. None for a new run.
        live: None asks the terminal.
        wandb: arguments of ``wandb.init``; None for no wandb.

    Raises:
        UserError: ``directory`` is not writable, or holds a run and ``resume_iteration`` is None, or its
            ``metrics.jsonl`` is corrupt, or a package that was asked for is missing.
    """

    def __init__(
        self,
        directory: Path,
        total_iterations: int,
        resume_iteration: int | None = None,
        live: bool | None = None,
        tensorboard: bool = True,
        wandb: dict[str, Any] | None = None,
    ) -> None:
        self.console = Console(highlight=False)
        if live is None:
            live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._files = MetricsFiles(directory, resume_iteration)
        rows = self._files.resumed
        self._env_steps = rows[-1].get("env_steps", 0.0) if rows else 0.0
        self._progress = Progress(directory.resolve().name, total_iterations, rows)
        self._live = Live(self._progress, console=self.console, refresh_per_second=2) if live else None
        self._tensorboard = self._wandb = None
        if tensorboard:
            writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
            purge_step = None if resume_iteration is None else _step(rows[-1]) + 1 if rows else 0
            self._tensorboard = writer(str(directory / "tensorboard"), purge_step=purge_step, flush_secs=10)
        if wandb is not None:
            self._wandb = _package("wandb", "wandb").init(**{"dir": str(directory), "resume": "auto", **wandb})

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.phase = "done" if kind is None else f"stopped: {self._progress.phase}"
        if self._live is not None:
            self._live.stop()
        self._files.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def iteration(self, row: Mapping[str, float]) -> None:
        """Log an iteration: plain numbers by name, among them ``iteration``, how many are done; row 0 is the start.

        A row with ``env_steps`` (of the whole run) and ``time/`` phases gets ``steps_per_second`` where steps were
        taken. Call this before the checkpoint that declares the iteration done: killed in between, the run has a row
        too many, which resuming cuts off, never a row too few.
        """
        full = dict(row)
        seconds = sum(value for key, value in row.items() if key.startswith("time/"))
        steps = row.get("env_steps", self._env_steps) - self._env_steps
        if steps > 0 and seconds > 0:
            full["steps_per_second"] = steps / seconds
        self._env_steps += steps
        self._files.append(full)
        self._progress.update(full)
        if self._live is None:
            self.console.print(self._progress.line(), markup=False, soft_wrap=True)
        step = _step(row)
        if self._tensorboard is not None:
            for key, value in full.items():
                if key not in ("iteration", "env_steps"):
                    self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(full, step=step)

    def warn(self, message: str) -> None:
        """Say something above the progress display that needs attention."""
        self.console.print(f"warning: {message}", markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show ``name`` as what the run does now; after an error it stays on show."""
        outer, self._progress.phase = self._progress.phase, name
        yield
        self._progress.phase = outer


def _step(row: Mapping[str, Any]) -> int:
    return int(row["env_steps"] if "env_steps" in row else row["iteration"])


def _package(module: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"log.{key}: {error}; install it with: pip install {key}") from error
