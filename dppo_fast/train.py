"""python -m dppo_fast.train cfg=<name> [key=value ...]: pre-train or fine-tune a policy.

resume=<run directory> continues a run exactly, from its last checkpoint or with resume_from=previous from the one
before; cfg=<file>.yaml takes a configuration of your own, or a run's config.yaml to repeat it.
--cfg job shows a configuration, --multirun sweeps (seed=1,2), cfg=<name> --help explains both.
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
    from dppo_fast.checkpoint import checkpoint_path, checkpoints, find
    from dppo_fast.config import plain
    from dppo_fast.log import RunLog, print_summary, read_metrics
    from dppo_fast.plot import learning_curve
    from dppo_fast.runtime.files import atomic_write
    from dppo_fast.runtime.profile import set_profile, tracing
    from dppo_fast.trainer import TrainingDiverged

    content = plain(node)
    config = parse(content)
    settings = config.log
    set_profile(config.profile)
    run = Path(config.resume or config.logdir)
    content |= {"resume": None, "resume_from": "latest", "logdir": str(run)}
    if config.resume is None and (run / "config.yaml").exists():
        raise UserError(f"logdir={run} holds a run already; choose another, or continue it with resume={run}")
    trainer = build_trainer(config, run, content)
    if config.resume is not None and checkpoints(run):
        trainer.restore(find(run, config.resume_from))
    first_row = None if config.resume is None else trainer.next_row
    traced = config.profile_iterations if config.profile == "torch" else []
    with (
        RunLog(run, config.train.n_train_itr, first_row, settings.live, settings.tensorboard, settings.wandb) as log,
        tracing(trainer.timer, run / "trace", traced, trainer.next_row),
    ):
        with atomic_write(run / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(content)).encode())
        try:
            trainer.train(log)
        except KeyboardInterrupt as interruption:
            raise KeyboardInterrupt(f"resume={run} continues the run") from interruption
        except TrainingDiverged as error:
            raise SystemExit(f"error: {error}") from error
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval/return" in row]
    artifacts = {"checkpoint": checkpoint_path(run, trainer.iteration)}
    if len(rows) > 1 or trainer.collector is None:
        learning_curve(run / "metrics.csv", run / "learning_curve.png")
        artifacts = {"learning curve": run / "learning_curve.png", **artifacts}
    if rows:
        print_summary(rows[0], rows[-1], artifacts)


def main(arguments: Sequence[str] | None = None) -> int:
    return hydra_main(train, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
