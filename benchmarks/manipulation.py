"""Does fine-tuning mend what demonstrations do badly? Robomimic's Lift and MetaWorld's Push, from scripts that miss.

    python -m benchmarks.manipulation run --task lift --out runs/lift
    python -m benchmarks.manipulation report --task lift runs/lift

``run`` records scripted demonstrations, pre-trains a diffusion policy on them and fine-tunes it with DPPO. ``report``
copies the metrics of the latter (CSV) and draws its success (PNG) to `benchmarks/results/`, and says whether it went
from somewhere in START to at least GATE in the run's own evaluations without noise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stages import stages
from dppo_fast.log import read_metrics
from dppo_fast.plot import learning_curves

START = 0.3, 0.7
GATE = 0.95
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Study:
    """The arguments of ``dppo_fast.collect`` and of both trainings."""

    title: str
    demonstrations: tuple[str, ...]
    pretraining: tuple[str, ...]
    finetuning: tuple[str, ...]


LIFT = (
    "policy.network.mlp_dims=[256,256,256]",  # of 512 each: one core
    "env.num_threads=1",
)
STUDIES = {
    "lift": Study(
        title="Robomimic's Lift, DPPO from scripted demonstrations",
        demonstrations=(
            "scripted=lift",
            "options.noise=0.02",
            "steps=12000",
            "num_envs=20",
            "env.max_episode_steps=100",
            "env.num_threads=1",
        ),
        pretraining=(
            "cfg=robomimic/pretrain/lift/pre_diffusion_mlp",
            *LIFT,
            "train.n_train_itr=150",  # of 3000, in larger steps; 200 succeed too often
            "train.val_freq=50",
            "train.eval_episodes=20",
            "algorithm.learning_rate=1e-3",
            "algorithm.lr_scheduler={first_cycle_steps: 200, warmup_steps: 5, min_lr: 1e-4}",
        ),
        finetuning=(
            "cfg=robomimic/finetune/lift/ft_ppo_diffusion_mlp",
            *LIFT,
            "env.num_envs=80",
            "train.n_steps=15",  # of 300: the first 60 env steps of every episode, in which the cube is lifted or never
            "train.reset_at_iteration=true",
            "train.n_train_itr=40",  # not more: values, which no rollout sees to an end, run away after 45
            "train.val_freq=20",
            "train.eval_episodes=100",
            "algorithm.gamma=0.95",  # of 0.999: what follows those steps must not outweigh them
            "algorithm.batch_size=2500",  # of 7500: an iteration has 12,000 denoising steps, not 150,000
            "algorithm.target_kl=1e-3",  # of 1: with so few samples some updates would go far
            "algorithm.actor_lr=3e-4",  # of 1e-4, but annealed
            "algorithm.actor_lr_scheduler={first_cycle_steps: 70, warmup_steps: 0, min_lr: 1e-5}",
            "algorithm.clip_ploss_coef=0.02",
            "algorithm.clip_ploss_coef_base=0.02",
        ),
    ),
    "metaworld": Study(
        title="MetaWorld's Push, DPPO from noisy scripted demonstrations",
        demonstrations=("scripted=metaworld-push", "options.displacement=0.02", "steps=15000", "num_envs=20"),
        pretraining=("cfg=metaworld/pretrain/push/pre_diffusion_mlp",),
        finetuning=("cfg=metaworld/finetune/push/ft_ppo_diffusion_mlp",),
    ),
}


def run(study: Study, out: Path, overrides: Sequence[str]) -> int:
    pretraining, finetuning = ([*stage, *overrides] for stage in (study.pretraining, study.finetuning))
    return stages(out / "demonstrations", out / "finetuned", study.demonstrations, pretraining, finetuning)


def report(task: str, folder: Path, results: Path) -> int:
    """Copy the metrics, draw them, print the verdict; 0 if the run starts and ends where it should."""
    csv, key = results / f"{task}.csv", "eval/success_rate"
    shutil.copy(folder / "finetuned" / "metrics.csv", csv)
    evaluations = [(row["env_steps"], row[key]) for row in read_metrics(csv) if key in row]
    (_, before), (steps, after) = evaluations[0], evaluations[-1]
    passed = START[0] <= before <= START[1] and after >= GATE
    verdict = "passes" if passed else "does not pass"
    print(f"{task}: {before:.0%} -> {after:.0%} after {steps:,.0f} env steps; {verdict}")
    learning_curves({"DPPO": [csv]}, results / f"{task}.png", gate=GATE, title=STUDIES[task].title, key=key)
    return 0 if passed else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--task", choices=list(STUDIES), required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("overrides", nargs="*", help="key=value, passed on to both trainings")
    two = commands.add_parser("report")
    two.add_argument("--task", choices=list(STUDIES), required=True)
    two.add_argument("folder", type=Path)
    two.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "run":
        return run(STUDIES[options.task], options.out, options.overrides)
    return report(options.task, options.folder, options.results)


if __name__ == "__main__":
    sys.exit(main())
