"""python -m dppo_fast.train cfg=<name> [key=value ...]: pre-train or fine-tune a policy.

resume=<run directory> continues a run exactly, from its last checkpoint or with resume_from=previous from the one
before; cfg=<file>.yaml takes a configuration of your own, or, with another logdir=, a run's config.yaml to repeat it.
--list [pattern] shows what there is for cfg=, --cfg job a configuration; --multirun sweeps (seed=1,2), cfg=<name>
--help explains both. dry_run=true builds everything, tells its sizes and how long an iteration will take, and stops.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any

from dppo_fast.cli import hydra_main
from dppo_fast.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dppo_fast.build import RunConfig


def train(node: DictConfig) -> None:
    """Run what ``node`` describes, and end with the evaluations before and after and the paths of what came of it.

    A configuration without an algorithm evaluates its ``policy.checkpoint``.
    """
    from omegaconf import OmegaConf

    from dppo_fast.build import build_trainer, parse
    from dppo_fast.checkpoint import checkpoint_path, checkpoints, find
    from dppo_fast.config import plain
    from dppo_fast.dry_run import rehearse
    from dppo_fast.log import RunLog, print_summary, read_metrics
    from dppo_fast.plot import learning_curve
    from dppo_fast.runtime.files import atomic_write
    from dppo_fast.runtime.profile import set_profile, tracing
    from dppo_fast.runtime.signals import Interrupted, StopRequest
    from dppo_fast.trainer import TrainingDiverged

    content = plain(node)
    config = parse(content)
    if not config.algorithm:
        _evaluate(config, content)
        return
    settings = config.log
    set_profile(config.profile)
    run = Path(config.resume or config.logdir)
    content |= {"resume": None, "resume_from": "latest", "logdir": str(run)}
    if config.resume is not None:
        kept = OmegaConf.select(OmegaConf.load(run / "config.yaml"), "seed")
        if config.seed != kept:
            raise UserError(f"seed={config.seed}: the run has seed {kept}, with which alone it can go on; leave it out")
    elif (run / "config.yaml").exists() and not config.dry_run:
        raise UserError(f"logdir={run} holds a run already; choose another, or continue it with resume={run}")
    trainer = build_trainer(config, run, content)
    if config.dry_run:
        print(rehearse(trainer))
        return
    if config.resume is not None and checkpoints(run):
        trainer.restore(find(run, config.resume_from))
        if trainer.iteration >= config.train.n_train_itr:
            print(f"{run} is at iteration {trainer.iteration}, its last; train.n_train_itr=<more> lets it go on")
    first_row = None if config.resume is None else trainer.next_row
    traced = config.profile_iterations if config.profile == "torch" else []
    with (
        RunLog(run, config.train.n_train_itr, first_row, settings.live, settings.tensorboard, settings.wandb) as log,
        tracing(trainer.timer, run / "trace", traced, trainer.next_row),
        StopRequest() as stop,
    ):
        if trainer.iteration < config.train.n_train_itr:
            with atomic_write(run / "config.yaml") as file:
                file.write(OmegaConf.to_yaml(OmegaConf.create(content)).encode())
        try:
            trainer.train(log, stop)
            if trainer.iteration < config.train.n_train_itr:
                raise KeyboardInterrupt
        except KeyboardInterrupt as interruption:
            raise Interrupted(f"resume={run} continues the run", stop.number or SIGINT) from interruption
        except TrainingDiverged as error:
            raise SystemExit(f"error: {error}") from error
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval/return" in row]
    artifacts = {"checkpoint": checkpoint_path(run, trainer.iteration)}
    if len(rows) > 1 or trainer.collector is None:
        learning_curve(run / "metrics.csv", run / "learning_curve.png")
        artifacts = {"learning curve": run / "learning_curve.png", **artifacts}
    if rows:
        print_summary(rows[0], rows[-1], artifacts)


def _evaluate(config: RunConfig, content: Mapping[str, Any]) -> None:
    from dppo_fast.config import resolve_path
    from dppo_fast.evaluate import EvaluateConfig, evaluate

    if config.policy.checkpoint is None:
        raise UserError("policy.checkpoint is missing: give the policy to evaluate")
    checkpoint = resolve_path(config.policy.checkpoint)
    settings = EvaluateConfig(
        checkpoint=checkpoint,
        episodes=config.train.eval_episodes,
        num_envs=config.train.eval_episodes,
        seed=config.seed,
        out=config.logdir,
        num_threads=config.num_threads,
        device=config.device,
    )
    evaluate(settings, content if checkpoint.endswith((".pt", ".pth")) else None)


def main(arguments: Sequence[str] | None = None) -> int:
    return hydra_main(train, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
