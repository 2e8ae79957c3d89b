"""``python -m dppo_fast.train cfg=<name> [key=value ...]``: pre-train or fine-tune a policy.

``resume=<run directory>`` continues a run exactly; ``--help``, ``--cfg job`` and ``--multirun`` are Hydra's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dppo_fast.cli import hydra_main
from dppo_fast.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(node: DictConfig) -> None:
    """Run what ``node`` describes, and end with the evaluations before and after and the paths of what came of it."""
    from omegaconf import OmegaConf

    from dppo_fast.build import build_trainer, parse
    from dppo_fast.checkpoint import checkpoint_path, find
    from dppo_fast.config import plain
    from dppo_fast.log import RunLog, print_summary, read_metrics
    from dppo_fast.plot import learning_curve
    from dppo_fast.runtime.files import atomic_write
    from dppo_fast.runtime.profile import set_profile

    content = plain(node)
    config = parse(content)
    settings = config.log
    set_profile(settings.profile)
    run = Path(config.resume or config.logdir)
    if config.resume is None and (run / "config.yaml").exists():
        raise UserError(f"logdir={run} holds a run already; choose another, or continue it with resume={run}")
    trainer = build_trainer(config, run, {**content, "resume": None, "resume_from": "latest", "logdir": str(run)})
    resume_row = None
    if config.resume is not None:
        trainer.restore(find(run, config.resume_from))
        resume_row = trainer.iteration + 1
        if trainer.iteration >= config.train.n_train_itr:
            raise UserError(
                f"resume={run} has finished its train.n_train_itr={config.train.n_train_itr} iterations; raise it"
            )
    else:
        _make_run_directory(run)
        with atomic_write(run / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(content)).encode())
    with RunLog(run, config.train.n_train_itr, resume_row, settings.live, settings.tensorboard, settings.wandb) as log:
        trainer.train(log)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval/return" in row]
    artifacts = {"checkpoint": checkpoint_path(run, trainer.iteration)}
    if len(rows) > 1 or trainer.collector is None:
        learning_curve(run / "metrics.csv", run / "learning_curve.png")
        artifacts = {"learning curve": run / "learning_curve.png", **artifacts}
    if rows:
        print_summary(rows[0], rows[-1], artifacts)


def _make_run_directory(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise UserError(f"logdir={run} is not writable ({error.strerror}); choose another directory") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line's arguments unless given; returns the exit code."""
    return hydra_main(train, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
