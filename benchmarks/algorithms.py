"""How do the algorithms compare? Each on Hopper, with its shipped configuration, for equally many env steps.

    python -m benchmarks.algorithms run --algorithm dql --seed 0 --out runs/algorithms/dql0
    python -m benchmarks.algorithms report runs/algorithms/*

``run`` trains for ENV_STEPS and evaluates every EVALUATE_EVERY over 40 deterministic episodes; ``report`` puts any
number of runs into the table (CSV) in `benchmarks/results/`, in place of those of the same algorithm and seed, and
draws the figure (PNG) of all. Diffusion policies start from the shipped one; RLPD and Cal-QL from random weights and
the shipped demonstrations, on which IBRL's policy has to be trained first:

    python -m dppo_fast.train cfg=gym/pretrain/hopper-medium-v2/pre_gaussian_mlp logdir=runs/algorithms/pretrained

Nothing is tuned. An iteration of the diffusion policies' configurations is 80,000 env steps; here it is shorter, so
that ENV_STEPS are a whole number of them, and so that critics that warm up for 5 iterations leave the actor some.
RLPD, Cal-QL and IBRL take fewer gradient steps than the authors' (RARE), with which a core takes 3 to 25 hours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from benchmarks.report import read_csv, write_csv
from dppo_fast.cli import guarded
from dppo_fast.log import read_metrics
from dppo_fast.runtime.files import atomic_write
from dppo_fast.train import main as train
from dppo_fast.types import UserError

ENV_STEPS = 200_000
EVALUATE_EVERY = 40_000
EVALUATIONS = range(0, ENV_STEPS + 1, EVALUATE_EVERY)
RESULTS = Path(__file__).parent / "results"
FINETUNE, SCRATCH = "gym/finetune/hopper-v2", "gym/scratch/hopper-v2"
SHIPPED, DEMONSTRATIONS, NOTHING = "the shipped policy", "demonstrations", "random weights"


@dataclass(frozen=True)
class Method:
    """``steps`` are the env steps of one iteration, after ``offline_iterations`` without any."""

    config: str
    start: str
    steps: int
    settings: tuple[str, ...] = ()
    offline_iterations: int = 0

    def arguments(self, seed: int, out: Path) -> list[str]:
        """For `dppo_fast.train`."""
        return [
            f"cfg={self.config}",
            f"seed={seed}",
            f"logdir={out}",
            f"train.n_train_itr={self.offline_iterations + ENV_STEPS // self.steps}",
            f"train.val_freq={EVALUATE_EVERY // self.steps}",
            "train.eval_episodes=40",
            *self.settings,
        ]


LONG = 40_000, ("train.n_steps=250",)
"""For those that learn from whole rollouts."""
SHORT = 8_000, ("train.n_steps=50",)
RARE = {
    "rlpd": ("algorithm.critic_num_update=1", "algorithm.update_freq=5", "algorithm.batch_size=128"),
    "calql": ("algorithm.num_update=125", "algorithm.online_utd_ratio=0.125"),
    "ibrl": ("algorithm.update_freq=16",),
}
"""A hundredth of the critics' gradient steps of RLPD's authors, of half the size, and an eighth of the others': a CPU
takes these in less than an hour."""

METHODS = {
    "dppo": Method(f"{FINETUNE}/ft_ppo_diffusion_mlp", SHIPPED, *LONG),
    "exact_ppo": Method(f"{FINETUNE}/ft_ppo_exact_diffusion_mlp", SHIPPED, *LONG),
    "rwr": Method(f"{FINETUNE}/ft_rwr_diffusion_mlp", SHIPPED, *LONG),
    "awr": Method(f"{FINETUNE}/ft_awr_diffusion_mlp", SHIPPED, *LONG),
    "dipo": Method(f"{FINETUNE}/ft_dipo_diffusion_mlp", SHIPPED, *SHORT),
    "idql": Method(f"{FINETUNE}/ft_idql_diffusion_mlp", SHIPPED, *SHORT),
    "dql": Method(f"{FINETUNE}/ft_dql_diffusion_mlp", SHIPPED, *SHORT),
    "qsm": Method(f"{FINETUNE}/ft_qsm_diffusion_mlp", SHIPPED, *SHORT),
    "ppo": Method(f"{SCRATCH}/ppo_gaussian_mlp", NOTHING, 10_000),
    "sac": Method(f"{SCRATCH}/sac_mlp", NOTHING, 200),
    "rlpd": Method(f"{SCRATCH}/rlpd_mlp", DEMONSTRATIONS, 200, RARE["rlpd"]),
    "calql": Method(f"{FINETUNE}/calql_mlp_online", DEMONSTRATIONS, 1_000, ("train.val_freq=20", *RARE["calql"]), 100),
    "ibrl": Method(
        f"{FINETUNE}/ibrl_mlp", DEMONSTRATIONS, 200, ("policy.checkpoint=runs/algorithms/pretrained", *RARE["ibrl"])
    ),
}


@dataclass(frozen=True)
class Run:
    """Its evaluation returns by env step, the last one's std over episodes, and what it took."""

    algorithm: str
    seed: int
    returns: Mapping[int, float]
    std: float | None
    minutes: float

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises UserError for a folder that holds no run of METHODS."""
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: not a run directory, it holds no config.yaml")
        config = OmegaConf.load(folder / "config.yaml")
        rows = read_metrics(folder / "metrics.jsonl")
        evaluations = {int(row.get("env_steps", 0)): row for row in rows if "eval/return" in row}
        returns = {at: evaluations[at]["eval/return"] for at in EVALUATIONS if at in evaluations}
        std = evaluations[ENV_STEPS]["eval/return_std"] if ENV_STEPS in evaluations else None
        seconds = sum(value for row in rows for key, value in row.items() if key.startswith("time/"))
        if config.algorithm.name not in METHODS:
            raise UserError(f"{folder}: algorithm.name={config.algorithm.name} is none of {', '.join(METHODS)}")
        return cls(config.algorithm.name, config.seed, returns, std, seconds / 60)

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Run:
        """The inverse of ``row``."""
        returns = {at: float(row[f"return_{at}"]) for at in EVALUATIONS if row[f"return_{at}"]}
        std = float(text) if (text := row[f"std_{ENV_STEPS}"]) else None
        return cls(row["algorithm"], int(row["seed"]), returns, std, float(row["minutes"]))

    def row(self) -> dict[str, Any]:
        """Of the table; what is still to come is empty."""
        returns = {f"return_{at}": self.returns.get(at, "") for at in EVALUATIONS}
        std = {f"std_{ENV_STEPS}": "" if self.std is None else self.std}
        first = {"algorithm": self.algorithm, "seed": self.seed, "start": METHODS[self.algorithm].start}
        return first | returns | std | {"minutes": self.minutes}


def draw(runs: Sequence[Run], png: Path) -> None:
    """One panel per algorithm, each run a line; DPPO's are grey in the panels of the others."""
    groups = {name: list(own) for name, own in groupby(runs, key=lambda run: run.algorithm)}
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(2.4 * columns, 1.9 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for (name, own), axes in zip(groups.items(), panels, strict=False):
            for run in groups.get("dppo", []):
                axes.plot(*points(run), color="0.75")
            for run in own:
                axes.plot(*points(run), color="#0072b2", marker="o", markersize=3)
            axes.set_title(f"{name}, from {METHODS[name].start}", loc="left", fontsize=8)
            axes.tick_params(labelbottom=True)
        for axes in panels:
            axes.set_axis_off()
        figure.supxlabel("thousand env steps")
        figure.supylabel("return")
        with atomic_write(png) as file:
            figure.savefig(file, format="png", dpi=150)


def points(run: Run) -> tuple[Any, Any]:
    """Thousands of env steps, and returns."""
    return np.array(list(run.returns)) / 1000, np.array(list(run.returns.values()))


def report(folders: Sequence[Path], results: Path) -> None:
    """``algorithms.csv`` and ``algorithms.png``, in the order of METHODS; IBRL's pre-training is passed over."""
    table = results / "algorithms.csv"
    known = [Run.from_row(row) for row in read_csv(table)] if table.is_file() else []
    new = [Run.read(folder) for folder in folders if folder.name != "pretrained"]
    latest = {(list(METHODS).index(run.algorithm), run.seed): run for run in [*known, *new]}
    runs = [latest[key] for key in sorted(latest)]
    write_csv((run.row() for run in runs), {}, table)
    draw(runs, results / "algorithms.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--algorithm", choices=list(METHODS), required=True)
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("overrides", nargs="*", help="key=value, passed on to dppo_fast.train")
    many = commands.add_parser("report")
    many.add_argument("runs", type=Path, nargs="+")
    many.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "run":
        return train([*METHODS[options.algorithm].arguments(options.seed, options.out), *options.overrides])
    return guarded(lambda: report(options.runs, options.results))


if __name__ == "__main__":
    sys.exit(main())
