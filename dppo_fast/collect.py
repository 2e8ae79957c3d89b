"""python -m dppo_fast.collect checkpoint=<file or run> out=<directory> [key=value ...]: record demonstrations.

scripted=<name> instead of a checkpoint records a scripted demonstrator (`dppo_fast.data.scripted`).
Writes ``train.npz`` and ``normalization.npz`` in the reference's formats, from which ``data.path`` and
``env.normalization`` pre-train a policy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.types import NoiseStream, Obs, UserError, require_ranges

if TYPE_CHECKING:
    import torch

    from dppo_fast.envs import ChunkEnv

    Decide: TypeAlias = Callable[[Obs, torch.Tensor], torch.Tensor]
    """Observations, and which of them [N] begin episodes -> actions [N, 1, Da], normalised to [-1, 1]."""


@dataclass
class CollectConfig:
    """``steps`` env steps at least, in whole episodes with a return in [min_return, max_return]; ``num_envs`` at once.

    ``deterministic`` acts without the policy's exploration. ``env`` changes a scripted demonstrator's environment,
    ``options`` are its own. Actions are recorded as commanded, before the simulator
    bounds them, but for ``action_bound``, a bound on their size. ``max_steps`` bounds the recording itself where few
    episodes qualify.
    """

    checkpoint: str | None = None
    scripted: str | None = None
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
    env: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = "-inf" if self.min_return is None else self.min_return
        positive = dict.fromkeys(("steps", "num_envs", "max_steps"), "[1, inf)")
        ranges = {"seed": "[0, 4294967295]", "max_return": f"[{least}, inf]", "action_bound": "(0, inf)"}
        require_ranges(self, "", {**positive, **ranges})
        if (self.checkpoint is None) == (self.scripted is None):
            raise UserError("give one of checkpoint=<file or run> and scripted=<name>")
        if self.scripted is None and (self.env or self.options):
            raise UserError("env and options go with scripted=<name>; a checkpoint has its own environment")


def collect(config: CollectConfig) -> dict[str, float]:
    """Record, write both files and return what ``Trajectories.describe`` says of the data."""
    import torch

    from dppo_fast.build import pick_device
    from dppo_fast.data.trajectories import TrajectoryRecorder
    from dppo_fast.runtime.files import require_free
    from dppo_fast.runtime.progress import progress

    out = Path(config.out)
    require_free(out / "train.npz")
    env, decide = (_trained if config.scripted is None else _scripted)(config, pick_device(config.device))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} is not writable ({error.strerror}); choose another directory") from error
    bound = math.inf if config.action_bound is None else config.action_bound
    recorder = TrajectoryRecorder(config.num_envs)
    obs = env.reset()
    first = torch.ones(config.num_envs, dtype=torch.bool, device=obs["state"].device)
    kept = recorded = 0
    with progress("recording", config.steps) as recording:
        while kept < config.steps:
            if recorded >= config.max_steps:
                raise UserError(
                    f"max_steps={config.max_steps}: only {kept} steps of episodes with a return in "
                    f"[{config.min_return}, {config.max_return}] came up; widen the range or raise max_steps"
                )
            action = decide(obs, first)
            state = env.raw_obs["state"][:, -1]
            step = env.step(action)
            raw = env.normalization.unnormalize_action(action[:, 0].cpu().numpy()).clip(-bound, bound)
            first = step.terminated | step.truncated
            valid = torch.ones_like(first) if step.valid is None else step.valid
            reward, *flags = (x.cpu().numpy() for x in (step.reward, step.terminated, step.truncated, valid))
            for episode in recorder.record(state, raw, reward, *flags):
                if (config.min_return is None or episode.episode_return >= config.min_return) and (
                    config.max_return is None or episode.episode_return <= config.max_return
                ):
                    kept += len(episode.rewards)
            obs = step.obs
            recorded += config.num_envs
            recording(min(kept, config.steps))
    env.close()
    trajectories, normalization = recorder.to_trajectories(config.min_return, config.max_return)
    trajectories.save(out / "train.npz")
    normalization.save(out / "normalization.npz")
    summary = trajectories.describe()
    print("  ".join(f"{name} {value:.6g}" for name, value in summary.items()))
    print(f"  {out / 'train.npz'}\n  {out / 'normalization.npz'}")
    return summary


def _trained(config: CollectConfig, device: torch.device) -> tuple[ChunkEnv, Decide]:
    """The environment and the policy of a checkpoint; the policy plans anew where its chunk is used up."""
    import torch

    from dppo_fast.build import load_policy
    from dppo_fast.config import naming
    from dppo_fast.envs import ChunkEnv

    with naming("checkpoint"):
        loaded = load_policy(str(config.checkpoint), device)
    loaded.policy.noise = NoiseStream(config.seed)
    chunk = loaded.config.task.act_steps
    env = loaded.make_env(config.num_envs, device, config.seed, act_steps=1)
    if not isinstance(env, ChunkEnv):
        raise UserError(f"checkpoint={config.checkpoint}: its environment does not tell raw observations, needed here")
    plan = torch.zeros(config.num_envs, chunk, env.action_dim, device=device)
    ages = torch.zeros(config.num_envs, dtype=torch.int64, device=device)  # steps of each env's plan that are used up

    def decide(obs: Obs, first: torch.Tensor) -> torch.Tensor:
        due = first | (ages >= chunk)
        if due.any():
            fresh = loaded.actor.act(obs, config.deterministic).action[:, :chunk]
            plan.copy_(torch.where(due[:, None, None], fresh, plan))
            ages.masked_fill_(due, 0)
        action = plan.gather(1, ages[:, None, None].expand(-1, 1, plan.shape[-1]))
        ages.add_(1)
        return action

    return env, decide


def _scripted(config: CollectConfig, device: torch.device) -> tuple[ChunkEnv, Decide]:
    """A scripted demonstrator and its environment, whose action bounds are [-1, 1]."""
    import torch

    from dppo_fast.config import choose, construct, typed
    from dppo_fast.data.scripted import SCRIPTED, demonstrator
    from dppo_fast.envs import ChunkEnv, EnvConfig, make_env

    choose(SCRIPTED, config.scripted, "scripted")
    cls = demonstrator(str(config.scripted))
    script = construct(cls, config.options, "options", num_envs=config.num_envs, seed=config.seed)
    keys = {**cls.env, **config.env, "num_envs": config.num_envs, "act_steps": 1}
    env = make_env(typed(EnvConfig, keys, "env"), device, config.seed)
    if not isinstance(env, ChunkEnv):
        raise UserError(f"scripted={config.scripted}: {keys['id']} does not tell raw observations, needed here")
    low, high = env.normalization.action_min, env.normalization.action_max

    def decide(obs: Obs, first: torch.Tensor) -> torch.Tensor:
        action = script.act(env.raw_obs["state"][:, -1], first.cpu().numpy())
        return torch.from_numpy(2 * (action - low) / (high - low) - 1)[:, None]

    return env, decide


def main(arguments: Sequence[str] | None = None) -> int:
    return command_main(CollectConfig, collect, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
