"""Does fine-tuning learn? The paper's Hopper configuration from the shipped policy, against a gate.

    python -m benchmarks.learning run --seed 0 --out runs/learning/seed0
    python -m benchmarks.learning run --seed 0 --out runs/learning/fault --fault shuffled_log_probs
    python -m benchmarks.learning run --seed 0 --out runs/learning/plain0 --plain
    python -m benchmarks.learning report --fault runs/learning/fault --plain runs/learning/plain* -- runs/learning/seed*

``run`` trains for ITERATIONS iterations of 80,000 env steps; ``report`` writes the curves as CSV and PNG to
`benchmarks/results/` and says which runs pass: an evaluation return of at least GATE over 40 deterministic episodes.
The control trains with a planted fault and must not pass, or the gate would prove nothing. ``run --plain`` trains
without kernels, graphs and rounding, and ``report --plain`` tells how often such runs enclose the mean of the others.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch

from dppo_fast.algorithms.ppo import PPO, Batch
from dppo_fast.log import read_metrics
from dppo_fast.plot import learning_curves
from dppo_fast.train import main as train

CONFIG = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
ITERATIONS = 16
GATE = 2800
RESULTS = Path(__file__).parent / "results"
PLAIN = ["graphs=off", "precision=fp32"]


def shuffle_log_probs() -> None:
    """Plant a fault: every decision is compared with the behaviour log-probs of another one."""
    prepare = PPO._prepare

    def faulty(self: PPO) -> Batch:
        batch = prepare(self)
        order = torch.randperm(len(batch.value), generator=self.generator, device=self.device)
        return batch._replace(record=batch.record | {"log_prob": batch.record["log_prob"][order]})

    PPO._prepare = faulty  # type: ignore[method-assign]


FAULTS = {"shuffled_log_probs": shuffle_log_probs}


def run(seed: int, out: Path, fault: str | None, plain: bool, overrides: list[str]) -> int:
    if fault is not None:
        FAULTS[fault]()
    if plain:
        os.environ["DPPO_FAST_BACKEND"] = "reference"
        overrides = [*PLAIN, *overrides]
    arguments = [f"cfg={CONFIG}", f"seed={seed}", f"logdir={out}", f"train.n_train_itr={ITERATIONS}"]
    return train([*arguments, "train.val_freq=2", "train.eval_episodes=40", *overrides])


def enclosed(runs: Sequence[Mapping[float, float]], plain: Sequence[Mapping[float, float]]) -> tuple[int, int]:
    """At how many evaluations, of all that the runs share, the mean of ``runs`` lies between those of ``plain``."""
    shared = set.intersection(*(set(run) for run in (*runs, *plain)))
    inside = [min(p[x] for p in plain) <= mean(r[x] for r in runs) <= max(p[x] for p in plain) for x in shared]
    return sum(inside), len(inside)


def report(runs: list[Path], fault: Path | None, plain: list[Path], results: Path) -> int:
    """Copy the metrics, draw them, print a verdict per run; 0 if all runs pass and the control does not."""
    curves: dict[str, list[Path]] = {}
    passed, returns = {}, {}
    for folder in [*runs, *plain, *([fault] if fault else [])]:
        csv = results / f"hopper_{folder.name}.csv"
        shutil.copy(folder / "metrics.csv", csv)
        table = [(row["env_steps"], row.get("eval/return", math.nan)) for row in read_metrics(csv)]
        evaluations = {steps: value for steps, value in table if math.isfinite(value)}
        returns[folder] = evaluations
        best = max(evaluations, key=lambda steps: evaluations[steps])
        first = next((steps for steps, value in evaluations.items() if value >= GATE), None)
        passed[folder] = first is not None
        when = f"passes {GATE} at {first:,.0f} env steps" if first is not None else f"never reaches {GATE}"
        print(f"{folder.name}: {evaluations[0]:.0f} -> {evaluations[best]:.0f} at {best:,.0f} env steps; {when}")
        label = "with a planted fault" if folder is fault else "plain PyTorch" if folder in plain else "DPPO"
        curves.setdefault(label, []).append(csv)
    if plain:
        inside, evaluated = enclosed([returns[run] for run in runs], [returns[run] for run in plain])
        print(f"at {inside} of {evaluated} evaluations the mean lies between those of plain PyTorch")
    learning_curves(curves, results / "hopper.png", gate=GATE, title="Hopper-v4, DPPO from the shipped policy")
    return 0 if all(passed[folder] for folder in [*runs, *plain]) and not (fault and passed[fault]) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--fault", choices=sorted(FAULTS))
    one.add_argument("--plain", action="store_true")
    one.add_argument("overrides", nargs="*", help="key=value, passed on to dppo_fast.train")
    many = commands.add_parser("report")
    many.add_argument("runs", type=Path, nargs="+")
    many.add_argument("--fault", type=Path)
    many.add_argument("--plain", type=Path, nargs="*", default=[])
    many.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments.seed, arguments.out, arguments.fault, arguments.plain, arguments.overrides)
    return report(arguments.runs, arguments.fault, arguments.plain, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
