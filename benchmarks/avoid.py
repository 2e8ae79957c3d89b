"""What does exploration look like? D3IL avoid, M1: fine-tuning diffusion, Gaussian and mixture policies with PPO.

    python -m benchmarks.avoid run --seed 42 --out runs/avoid/seed42
    python -m benchmarks.avoid report runs/avoid/*

``run`` records 8 scripted demonstrations, half of them in the mode that pays, pre-trains each policy on them and
fine-tunes it, with the paper's settings but shorter: 600 of 5000 epochs, in larger batches and steps, and 20 of 51
iterations. ``report`` writes a table (CSV) of ROLLOUTS episodes before and after fine-tuning, and the trajectories of
the last folder's (PNG), to `benchmarks/results/`: with the noise that fine-tuning explores with, but for ``success``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from benchmarks.report import write_csv
from benchmarks.stages import stages
from dppo_fast.build import RunConfig, env_config, load_policy, parse, start_policy
from dppo_fast.cli import guarded
from dppo_fast.data.scripted.avoid import SUBSETS
from dppo_fast.envs import ChunkEnv, make_env
from dppo_fast.envs.avoid_task import MODES, sides_of
from dppo_fast.log import read_metrics
from dppo_fast.plot_avoid import draw_trajectories
from dppo_fast.policies.base import Policy
from dppo_fast.types import NoiseStream

METHODS = {"diffusion": "DPPO", "gaussian": "Gaussian PPO", "gmm": "GMM PPO"}
DEMONSTRATIONS = ("scripted=avoid", "options.subset=m1", "num_envs=8", "steps=800")
PRETRAINING = (
    "train.n_train_itr=600",
    "train.val_freq=0",
    "algorithm.batch_size=64",
    "algorithm.learning_rate=1e-3",
    "algorithm.lr_scheduler={first_cycle_steps: 600, warmup_steps: 5, min_lr: 1e-4}",
)
FINETUNING = ("train.n_train_itr=20", "train.val_freq=5")
ROLLOUTS = 50
RESULTS = Path(__file__).parent / "results"


def run(methods: Sequence[str], out: Path, seed: int, pretraining: Sequence[str], finetuning: Sequence[str]) -> int:
    """Demonstrations, unless they are there, and pre-training and fine-tuning of every method on them."""
    code = 0
    for method in methods:
        code = code or stages(
            out / "demonstrations",
            out / method,
            DEMONSTRATIONS,
            [f"cfg=d3il/pretrain/avoid_m1/pre_{method}_mlp", f"seed={seed}", *pretraining],
            [f"cfg=d3il/finetune/avoid_m1/ft_ppo_{method}_mlp", f"seed={seed}", *finetuning],
        )
    return code


@dataclass(frozen=True)
class Episodes:
    """Of N episodes the rod's paths [N, L, 2] and the rewards [N, L]."""

    paths: NDArray[np.float64]
    rewards: NDArray[np.float64]

    @property
    def until_lost(self) -> list[NDArray[np.float64]]:
        """The paths up to a collision, after which the reward stays negative, or leaving the table for good."""
        lost = np.logical_and.accumulate((self.rewards < 0)[:, ::-1], axis=1)
        lengths = self.rewards.shape[1] - lost.sum(1)
        return [path[: max(length, 1)] for path, length in zip(self.paths, lengths, strict=True)]

    def success(self, chunk: int, threshold: float) -> float:
        chunks = self.rewards.reshape(len(self.rewards), -1, chunk).mean(-1)
        return float((chunks.max(1) >= threshold).mean())

    def within(self, modes: Sequence[tuple[int, ...]]) -> float:
        """The share that passes all lines, without a loss, in one of ``modes``."""
        return float(np.mean([sides_of(path) in modes for path in self.until_lost]))


def rollouts(policy: Policy, config: RunConfig, deterministic: bool, number: int) -> Episodes:
    """One episode in each of ``number`` MuJoCo envs, which all end together."""
    settings = replace(env_config(config, number), act_steps=1, backend="avoid")
    env = make_env(settings, "cpu", config.seed, training=False)
    assert isinstance(env, ChunkEnv)
    policy.noise = NoiseStream(config.seed)
    obs = env.reset()
    paths, rewards = [], []
    for t in range(settings.max_episode_steps):
        if t % config.task.act_steps == 0:
            plan = policy.act(obs, deterministic).action
        paths.append(env.raw_obs["state"][:, -1, 2:])
        step = env.step(plan[:, [t % config.task.act_steps]])
        obs = step.obs
        rewards.append(step.reward.numpy())
    env.close()
    return Episodes(np.stack(paths, 1), np.stack(rewards, 1).astype(np.float64))


def measure(out: Path, panels: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """A row for each policy of a run before and after; their paths become ``panels``."""
    cpu = torch.device("cpu")
    for stage in ("pre-trained", "fine-tuned"):
        for method, title in METHODS.items():
            config = parse(OmegaConf.load(out / method / "config.yaml"))
            if stage == "pre-trained":
                policy = start_policy(config, {"state": (1, 4)}, 2, cpu)
            else:
                policy = load_policy(out / method, cpu).policy
            steps = max(row.get("env_steps", 0) for row in read_metrics(out / method / "metrics.jsonl"))
            exploring, best = (rollouts(policy, config, deterministic, number) for deterministic in (False, True))
            chunk, threshold = config.task.act_steps, config.task.best_reward_threshold_for_success
            row = {
                "method": title,
                "seed": config.seed,
                "policy": stage,
                "env_steps": steps if stage == "fine-tuned" else 0,
                "success": best.success(chunk, threshold),
                "success_exploring": exploring.success(chunk, threshold),
                "in_modes_of_data": exploring.within(SUBSETS["m1"]),
                "in_any_mode": exploring.within(MODES),
            }
            panels[f"{title}, {stage}\nsuccess {row['success_exploring']:.0%}"] = exploring.until_lost
            yield row


def report(folders: Sequence[Path], results: Path, number: int) -> None:
    panels: dict[str, Any] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for out in folders:
            panels.clear()
            yield from measure(out, panels, number)

    write_csv(rows(), {"episodes": number}, results / "avoid_m1.csv")
    draw_trajectories(panels, results / "avoid_m1.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--method", choices=list(METHODS), action="append")
    one.add_argument("--seed", type=int, default=42)
    one.add_argument("overrides", nargs="*", help="key=value, passed on to both trainings")
    two = commands.add_parser("report")
    two.add_argument("runs", type=Path, nargs="+")
    two.add_argument("--results", type=Path, default=RESULTS)
    two.add_argument("--episodes", type=int, default=ROLLOUTS)
    options = parser.parse_args(arguments)
    if options.command == "run":
        settings = ([*stage, *options.overrides] for stage in (PRETRAINING, FINETUNING))
        return run(options.method or list(METHODS), options.out, options.seed, *settings)
    return guarded(lambda: report(options.runs, options.results, options.episodes))


if __name__ == "__main__":
    sys.exit(main())
