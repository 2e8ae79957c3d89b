"""python -m dppo_fast.collect checkpoint=<file or run> out=<directory> [key=value ...]: record demonstrations.

Writes ``train.npz`` and ``normalization.npz`` in the reference's formats, from which ``data.path`` and
``env.normalization`` pre-train a policy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.types import NoiseStream, UserError, require_ranges


@dataclass
class CollectConfig:
    """``steps`` env steps at least, in whole episodes with a return in [min_return, max_return]; ``num_envs`` at once.

    ``deterministic`` acts without the policy's exploration. Actions are recorded as commanded, before the simulator
    bounds them, but for ``action_bound``, a bound on their size. ``max_steps`` bounds the recording itself where few
    episodes qualify.
    """

    checkpoint: str = MISSING
    out: str = MISSING
    steps: int = 100_000
    num_envs: int = 32
    seed: int = 0
    deterministic: bool = False
    min_return: float | None = None
    max_return: float | None = None
    action_bound: float | None = None
    max_steps: int = 10_000_000
    device: str = "auto"

    def __post_init__(self) -> None:
        least = "-inf" if self.min_return is None else self.min_return
        positive = dict.fromkeys(("steps", "num_envs", "max_steps"), "[1, inf)")
        ranges = {"seed": "[0, 4294967295]", "max_return": f"[{least}, inf]", "action_bound": "(0, inf)"}
        require_ranges(self, "", {**positive, **ranges})


def collect(config: CollectConfig) -> dict[str, float]:
    """Record, write both files and return what ``Trajectories.describe`` says of the data."""
    import torch
    from rich.progress import Progress

    from dppo_fast.build import load_policy, pick_device
    from dppo_fast.config import naming
    from dppo_fast.data.trajectories import TrajectoryRecorder

    device = pick_device(config.device)
    with naming("checkpoint"):
        loaded = load_policy(config.checkpoint, device)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} is not writable ({error.strerror}); choose another directory") from error
    loaded.policy.noise = NoiseStream(config.seed)
    chunk = loaded.config.task.act_steps
    bound = math.inf if config.action_bound is None else config.action_bound
    env = loaded.make_env(config.num_envs, device, config.seed, act_steps=1)
    recorder = TrajectoryRecorder(config.num_envs)
    obs = env.reset()
    kept = recorded = 0
    plan = loaded.policy.act(obs, config.deterministic).action[:, :chunk]
    ages = torch.zeros(config.num_envs, dtype=torch.int64, device=device)  # steps of each env's plan that are used up
    with Progress(transient=True) as progress:
        task = progress.add_task("recording", total=config.steps)
        while kept < config.steps:
            if recorded >= config.max_steps:
                raise UserError(
                    f"max_steps={config.max_steps}: only {kept} steps of episodes with a return in "
                    f"[{config.min_return}, {config.max_return}] came up; widen the range or raise max_steps"
                )
            due = ages >= chunk
            if due.any():
                fresh = loaded.policy.act(obs, config.deterministic).action[:, :chunk]
                plan = torch.where(due[:, None, None], fresh, plan)
                ages = torch.where(due, 0, ages)
            action = plan.gather(1, ages[:, None, None].expand(-1, 1, plan.shape[-1]))
            state = env.raw_obs["state"][:, -1]
            step = env.step(action)
            raw = env.normalization.unnormalize_action(action[:, 0].cpu().numpy()).clip(-bound, bound)
            ended = step.terminated | step.truncated
            valid = torch.ones_like(ended) if step.valid is None else step.valid
            reward, *flags = (x.cpu().numpy() for x in (step.reward, step.terminated, step.truncated, valid))
            for episode in recorder.record(state, raw, reward, *flags):
                if (config.min_return is None or episode.episode_return >= config.min_return) and (
                    config.max_return is None or episode.episode_return <= config.max_return
                ):
                    kept += len(episode.rewards)
            ages = torch.where(ended, chunk, ages + 1)
            obs = step.obs
            recorded += config.num_envs
            progress.update(task, completed=min(kept, config.steps))
    env.close()
    trajectories, normalization = recorder.to_trajectories(config.min_return, config.max_return)
    trajectories.save(out / "train.npz")
    normalization.save(out / "normalization.npz")
    summary = trajectories.describe()
    print("  ".join(f"{name} {value:.6g}" for name, value in summary.items()))
    print(f"  {out / 'train.npz'}\n  {out / 'normalization.npz'}")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    return command_main(CollectConfig, collect, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
