"""python -m dppo_fast.evaluate checkpoint=<file or run> [episodes=100] [video=8] [key=value ...]: how good a policy is.

checkpoint=[a,b] compares several. The reference's .pt files also need cfg=<name> and its overrides, as train takes
them, for the run that they are of (env.normalization=<npz> is what normalised its observations); a configuration of
an evaluation names its own checkpoint. out=, by default runs/evaluation/<time>, gets evaluation.json with what the
table shows, episodes.csv with every episode, and the videos.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dppo_fast.cli import described_main
from dppo_fast.types import UserError, require_ranges

if TYPE_CHECKING:
    import torch

    from dppo_fast.build import LoadedPolicy
    from dppo_fast.evaluator import Episodes

MODES = {"deterministic": [True], "stochastic": [False], "both": [True, False]}
"""``mode`` -> whether to act deterministically, one evaluation each."""

RESAMPLES = 10_000

WIDE = 100
"""Characters at which a table's row needs but one line."""


@dataclass
class EvaluateConfig:
    """``checkpoint`` is one or a list of them. Each plays ``episodes`` in each ``mode`` (deterministic, stochastic or
    both), in ``num_envs`` environments at once, of which the first ``video`` film their first episode.
    ``num_threads=0`` leaves PyTorch's.
    """

    checkpoint: Any = None
    episodes: int = 100
    num_envs: int = 40
    mode: str = "both"
    video: int = 0
    seed: int = 0
    out: str | None = None
    num_threads: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        filmed = min(self.episodes, self.num_envs)
        positive = dict.fromkeys(("episodes", "num_envs"), "[1, inf)")
        ranges = {"video": f"[0, {filmed}]", "seed": "[0, 4294967295]", "num_threads": "[0, inf)"}
        require_ranges(self, "", {**positive, **ranges})


class Estimate(NamedTuple):
    """A mean over episodes and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One evaluation. ``S`` and ``F`` are None for a policy that does not denoise; ``change`` is the return's, episode
    by episode, against the first checkpoint on the same task in the same mode, None for that one.
    """

    checkpoint: str
    source: str
    env: str
    mode: str
    S: int | None
    F: int | None
    episodes: Episodes
    success_rate: Estimate
    episode_return: Estimate
    change: Estimate | None

    def summary(self) -> dict[str, Any]:
        """What ``evaluation.json`` says of it."""
        own = {key: getattr(self, key) for key in ("checkpoint", "source", "env", "mode", "S", "F")}
        estimates = {"success_rate": self.success_rate, "return": self.episode_return, "return_change": self.change}
        named = {key: value and value._asdict() for key, value in estimates.items()}
        return own | self.episodes.statistics() | named


def bootstrap(values: NDArray[Any]) -> Estimate:
    """The mean and its 95 % interval by the percentile bootstrap (Efron 1979), from the same resamples every time."""
    rng, count = np.random.default_rng(0), len(values)
    means = [values[rng.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def success_rate(success: NDArray[np.bool_]) -> Estimate:
    """As `bootstrap`, but where all E episodes succeed or all fail, of which every resample is a copy: there the
    interval ends at the rate that gives such a result in 2.5 % of evaluations (Clopper and Pearson 1934).
    """
    bound = float(0.025 ** (1 / len(success)))
    if success.all():
        return Estimate(1.0, bound, 1.0)
    return bootstrap(success) if success.any() else Estimate(0.0, 0.0, 1 - bound)


def evaluate(config: EvaluateConfig, run: Mapping[str, Any] | None = None) -> list[Result]:
    """Evaluate, print a table and write the files; ``run`` configures the run that the reference's files are of."""
    import torch

    from dppo_fast.build import env_config, pick_device
    from dppo_fast.config import choose, naming
    from dppo_fast.evaluator import Evaluator
    from dppo_fast.policies.diffusion import DiffusionPolicy
    from dppo_fast.runtime.gl import headless_gl
    from dppo_fast.runtime.progress import progress
    from dppo_fast.types import VecEnv
    from dppo_fast.video import Filmed

    modes, device = choose(MODES, config.mode, "mode"), pick_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.video:
        headless_gl()  # before a simulator is imported
    with naming("checkpoint"):
        policies = {checkpoint: _load(checkpoint, device, run) for checkpoint in _named(config.checkpoint, run)}
    out = _make_directory(config.out)

    def make_env(loaded: LoadedPolicy, label: str) -> VecEnv:
        env = loaded.make_env(min(config.num_envs, config.episodes), device, config.seed)
        return Filmed(env, range(config.video), out / "videos", lambda: label) if config.video else env

    results: list[Result] = []
    first: dict[tuple[str, str], NDArray[np.float64]] = {}
    for (number, (checkpoint, loaded)), deterministic in product(enumerate(policies.items(), start=1), modes):
        policy, task, env = loaded.policy, loaded.config.task, env_config(loaded.config, normalized=True).id
        mode = "deterministic" if deterministic else "stochastic"
        evaluator = Evaluator(
            partial(make_env, loaded, f"{number}_{mode}"),
            config.seed,
            task.best_reward_threshold_for_success,
            task.sparse_reward,
            deterministic,
            config.episodes,
        )
        with progress(f"{checkpoint}, {mode}, episodes", config.episodes) as done:
            episodes = evaluator.run(loaded.actor, done)
        S, F = (policy.schedule.steps, policy.ft_steps) if isinstance(policy, DiffusionPolicy) else (None, None)
        before = first.setdefault((env, mode), episodes.returns)
        change = None if before is episodes.returns else bootstrap(episodes.returns - before)
        estimates = success_rate(episodes.success), bootstrap(episodes.returns)
        results.append(Result(checkpoint, loaded.source, env, mode, S, F, episodes, *estimates, change))
    _write(out, config, results)
    _print(results)
    print(*(f"  {file}" for file in sorted(out.rglob("*.*"))), sep="\n")
    return results


def _named(checkpoint: Any, run: Mapping[str, Any] | None) -> list[str]:
    """The checkpoints that the arguments name, each once."""
    from dppo_fast.config import resolve_path

    if checkpoint is None and run is not None:
        checkpoint = run["policy"].get("checkpoint")
    named = checkpoint if isinstance(checkpoint, list) else [checkpoint] if checkpoint else []
    checkpoints = list(dict.fromkeys(resolve_path(str(name)) for name in named))
    if not checkpoints:
        raise UserError("missing; give a file or a run directory, or several as in checkpoint=[a,b]")
    if run is not None and not any(map(_is_reference, checkpoints)):
        raise UserError(
            f"cfg is for the reference's .pt files; {checkpoints[0]} holds its own configuration: remove it"
        )
    return checkpoints


def _load(checkpoint: str, device: torch.device, run: Mapping[str, Any] | None) -> LoadedPolicy:
    """The policy of either kind of checkpoint, ready to act."""
    from dppo_fast.build import env_config, load_policy, policy_of
    from dppo_fast.checkpoint import ReferenceCheckpoint
    from dppo_fast.convert import from_reference
    from dppo_fast.policies.diffusion import DiffusionPolicy

    if not _is_reference(checkpoint):
        loaded = load_policy(checkpoint, device)
    elif run is None:
        raise UserError(
            f"{checkpoint}: a file of the reference tells neither task nor denoising steps; add cfg=<name>, of which "
            "python -m dppo_fast.train --list shows all"
        )
    else:
        file = Path(checkpoint)
        loaded = policy_of(from_reference(ReferenceCheckpoint.load(file), run).policy_weights(file), device)
    env_config(loaded.config)  # refuses a run without an environment
    loaded.policy.eval()
    if isinstance(loaded.policy, DiffusionPolicy):
        loaded.policy.sampler.enabled = device.type == "cuda"
    return loaded


def _is_reference(checkpoint: str) -> bool:
    return checkpoint.endswith((".pt", ".pth"))


def _make_directory(out: str | None) -> Path:
    directory = Path(out or f"runs/evaluation/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"out={directory} holds files already; choose another directory")
    except OSError as error:
        raise UserError(f"out={directory} is not writable ({error.strerror}); choose another directory") from error
    return directory


def _write(out: Path, config: EvaluateConfig, results: Sequence[Result]) -> None:
    from dppo_fast.runtime.files import atomic_write

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["checkpoint", "mode", "episode", "return", "success", "best_reward", "length"])
    for result in results:
        episodes = result.episodes
        columns = (episodes.returns, episodes.success.astype(int), episodes.scores, episodes.lengths)
        for number, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            writer.writerow([result.checkpoint, result.mode, number, *row])
    summary = {"settings": asdict(config), "results": [result.summary() for result in results]}
    for name, text in {"episodes.csv": table.getvalue(), "evaluation.json": json.dumps(summary, indent=2)}.items():
        with atomic_write(out / name) as file:
            file.write(text.encode())


def _print(results: Sequence[Result]) -> None:
    """The policies by number, then one table of all results; on a narrow terminal intervals go below their means."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    below = "\n" if console.width < WIDE else " "
    policies = {result.checkpoint: result for result in results}
    for number, policy in enumerate(policies.values(), start=1):
        steps = "" if policy.S is None else f", S {policy.S}, F {policy.F}"
        console.print(f"  {number}  {policy.source}: {policy.env}{steps}", markup=False, soft_wrap=True)
    table = Table("", "mode", box=SIMPLE_HEAD)
    compared = any(result.change for result in results)
    for title in ("success, %", "return", *(["change"] if compared else []), "length"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        cells = [
            _interval([100 * value for value in result.success_rate], below, scale=100),
            _interval(result.episode_return, below),
            *([_interval(result.change, below) if result.change else ""] if compared else []),
        ]
        length = f"{result.episodes.lengths.mean():,.0f}"
        table.add_row(str(list(policies).index(result.checkpoint) + 1), result.mode, *cells, length)
    console.print(table)
    print(f"  means over {len(results[0].episodes.returns)} episodes and their 95 % intervals")


def _interval(estimate: Sequence[float], below: str, scale: float | None = None) -> str:
    from dppo_fast.log.display import number

    mean, low, high = (number(value, scale or max(map(abs, estimate))) for value in estimate)
    return f"{mean}{below}\\[{low}, {high}]"


def main(arguments: Sequence[str] | None = None) -> int:
    return described_main(EvaluateConfig, evaluate, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
