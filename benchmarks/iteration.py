"""Where the seconds of a training iteration go, and what making everything but the environment faster could give.

    python -m benchmarks.iteration cfg=gym/finetune/hopper-v2/ft_ppo_diffusion_mlp num_threads=2
    python -m benchmarks.iteration --iterations 5 --out iteration.csv cfg=quickstart train.n_steps=50

The phases are medians over a few iterations after the first, without evaluation and checkpoints: ``sampling`` is the
actor's, ``env`` the simulator's, ``advantage`` values, reward scaling and GAE, ``update`` the minibatches, ``other``
the rest of the wall clock. On a GPU every phase waits for the device, so overlap between phases is not seen here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

from omegaconf import DictConfig

from benchmarks.report import environment, write_csv
from dppo_fast.algorithms.ppo import PPO
from dppo_fast.build import build_trainer, parse, pick_device
from dppo_fast.cli import hydra_main
from dppo_fast.config import plain
from dppo_fast.log import RunLog
from dppo_fast.trainer import Trainer
from dppo_fast.types import UserError

PHASES = ("sampling", "env", "advantage", "update", "other")
UNTIMED = ["train.val_freq=0", "train.save_freq=1000000", "train.n_train_itr=1000000"]
"""Overrides: no evaluation, no checkpoints, and the end is ours to say."""


class Finished(Exception):
    """Enough iterations have been measured."""


class IterationLog:
    """Stands for the trainer's `RunLog`: hands each row to ``on_row``, with its wall-clock seconds as ``seconds``.

    What ``on_row`` does between two iterations is in neither of them.
    """

    def __init__(self, on_row: Callable[[dict[str, float]], object]) -> None:
        self.on_row = on_row
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def iteration(self, row: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self.start
        self.on_row({**row, "seconds": seconds})
        self.start = time.perf_counter()


def run_iterations(trainer: Trainer, on_row: Callable[[dict[str, float]], object]) -> None:
    """Train until ``on_row`` raises `Finished`; row 0 comes before the first iteration."""
    try:
        trainer.train(cast(RunLog, IterationLog(on_row)))
    except Finished:
        pass
    finally:
        if trainer.collector is not None:
            trainer.collector.env.close()


def time_stages(trainer: Trainer) -> None:
    """Let the trainer's timer tell sampling, env and advantage apart, in this object only."""
    algorithm, collector = trainer.algorithm, trainer.collector
    if collector is None or not isinstance(algorithm, PPO):
        raise UserError("benchmarks.iteration measures on-policy runs; this configuration has no environment")
    stages = (
        (collector.actor, "act", "sampling"),
        (collector.env, "step", "env"),
        (algorithm, "_prepare", "advantage"),
    )
    for owner, method, phase in stages:
        setattr(owner, method, _timed(trainer, getattr(owner, method), phase))


def _timed(trainer: Trainer, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with trainer.timer(phase):
            return call(*args, **kwargs)

    return timed


def phases(row: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase of one iteration; they add up to its wall clock."""
    seconds = {phase: row[f"time/{phase}"] for phase in PHASES[:-1]}
    return seconds | {"other": row["seconds"] - sum(seconds.values())}


def amdahl_ceiling(seconds: Mapping[str, float]) -> float:
    """How many times faster an iteration would be if everything but the environment took no time."""
    return sum(seconds.values()) / seconds["env"]


def measure(node: DictConfig, iterations: int) -> list[dict[str, Any]]:
    """One row per phase: median seconds over ``iterations``, after one that warms up."""
    config = parse(plain(node))
    measured: list[dict[str, float]] = []

    def on_row(row: dict[str, float]) -> None:
        if row["iteration"] > 1:
            measured.append(phases(row))
        if len(measured) == iterations:
            raise Finished

    with TemporaryDirectory() as run:
        trainer = build_trainer(config, Path(run))
        time_stages(trainer)
        run_iterations(trainer, on_row)
    seconds = {phase: median(row[phase] for row in measured) for phase in PHASES}
    total = sum(seconds.values())
    ceiling = amdahl_ceiling(seconds)
    return [
        {"phase": phase, "seconds": value, "percent": 100 * value / total, "amdahl_ceiling": ceiling}
        for phase, value in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("settings", nargs="+", help="cfg=<name> [key=value ...], as for dppo_fast.train")
    options = parser.parse_args(arguments)

    def task(node: DictConfig) -> None:
        rows = measure(node, options.iterations)
        write_csv(rows, environment(pick_device(node.device)), options.out)
        print(f"at most {rows[0]['amdahl_ceiling']:.2f}x faster, if everything but env took no time")

    return hydra_main(task, [*options.settings, *UNTIMED], __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
