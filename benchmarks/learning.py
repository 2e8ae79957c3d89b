"""Does fine-tuning learn? The paper's Hopper configuration from the shipped policy, against a gate.

    python -m benchmarks.learning run --seed 0 --out runs/learning/seed0
    python -m benchmarks.learning run --seed 0 --out runs/learning/fault --fault shuffled_log_probs
    python -m benchmarks.learning report --fault runs/learning/fault runs/learning/seed*

``run`` trains for ITERATIONS iterations of 80,000 env steps; ``report`` writes the curves as CSV and PNG to
`benchmarks/results/` and says which runs pass: an evaluation return of at least GATE over 40 deterministic episodes.
The control trains with a planted fault and must not pass, or the gate would prove nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from dppo_fast.algorithms.ppo import PPO, Batch
from dppo_fast.log import read_metrics
from dppo_fast.plot import learning_curves
from dppo_fast.train import main as train

CONFIG = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
ITERATIONS = 16
GATE = 2800
RESULTS = Path(__file__).parent / "results"


def shuffle_log_probs() -> None:
    """Plant a fault: every decision is compared with the behaviour log-probs of another one."""
    prepare = PPO._prepare

    def faulty(self: PPO) -> Batch:
        batch = prepare(self)
        order = torch.randperm(len(batch.value), generator=self.generator, device=self.device)
        return batch._replace(record=batch.record | {"log_prob": batch.record["log_prob"][order]})

    PPO._prepare = faulty  # type: ignore[method-assign]


FAULTS = {"shuffled_log_probs": shuffle_log_probs}


def run(seed: int, out: Path, fault: str | None, overrides: list[str]) -> int:
    if fault is not None:
        FAULTS[fault]()
    arguments = [f"cfg={CONFIG}", f"seed={seed}", f"logdir={out}", f"train.n_train_itr={ITERATIONS}"]
    return train([*arguments, "train.val_freq=2", "train.eval_episodes=40", *overrides])


def report(runs: list[Path], fault: Path | None, results: Path) -> int:
    """Copy the metrics, draw them, print a verdict per run; 0 if all runs pass and the control does not."""
    curves: dict[str, list[Path]] = {}
    passed = {}
    for folder in [*runs, *([fault] if fault else [])]:
        csv = results / f"hopper_{folder.name}.csv"
        shutil.copy(folder / "metrics.csv", csv)
        evaluations = {row["env_steps"]: row["eval/return"] for row in read_metrics(csv) if "eval/return" in row}
        best = max(evaluations, key=lambda steps: evaluations[steps])
        first = next((steps for steps, value in evaluations.items() if value >= GATE), None)
        passed[folder] = first is not None
        when = f"passes {GATE} at {first:,.0f} env steps" if first is not None else f"never reaches {GATE}"
        print(f"{folder.name}: {evaluations[0]:.0f} -> {evaluations[best]:.0f} at {best:,.0f} env steps; {when}")
        curves.setdefault("with a planted fault" if folder is fault else "DPPO", []).append(csv)
    learning_curves(curves, results / "hopper.png", gate=GATE, title="Hopper-v4, DPPO from the shipped policy")
    return 0 if all(passed[folder] for folder in runs) and not (fault and passed[fault]) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--fault", choices=sorted(FAULTS))
    one.add_argument("overrides", nargs="*", help="key=value, passed on to dppo_fast.train")
    many = commands.add_parser("report")
    many.add_argument("runs", type=Path, nargs="+")
    many.add_argument("--fault", type=Path)
    many.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments.seed, arguments.out, arguments.fault, arguments.overrides)
    return report(arguments.runs, arguments.fault, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
