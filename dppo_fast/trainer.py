"""The loop that every algorithm runs in: collect, update, evaluate, save, log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dppo_fast.algorithms.base import Algorithm
from dppo_fast.checkpoint import Checkpoint, CheckpointError, checkpoint_path, checkpoints, load_weights, prune
from dppo_fast.evaluator import Evaluator
from dppo_fast.journal import Journal
from dppo_fast.log import RunLog
from dppo_fast.rollout import Collector
from dppo_fast.runtime.profile import PhaseTimer
from dppo_fast.types import Metrics, NoiseStream, require_ranges

HEALTHY_CLIP_FRACTION = 0.01
"""Of the first minibatch, whose ratios are 1 but for rounding."""


@dataclass(frozen=True)
class TrainConfig:
    """``n_steps`` decisions per env and iteration; evaluation every ``val_freq`` iterations (0: never) over
    ``eval_episodes`` episodes. A checkpoint is written every ``save_freq`` iterations; the newest
    ``keep_checkpoints`` and those of every ``save_model_freq``-th iteration stay.

    ``reset_at_iteration`` starts new episodes at every iteration. ``evaluate_in_place`` is the reference's way: every
    ``val_freq``-th iteration, the first included, runs the training envs deterministically and learns nothing.
    """

    n_train_itr: int = 1000
    n_steps: int = 500
    val_freq: int = 10
    eval_episodes: int = 40
    save_freq: int = 1
    save_model_freq: int = 100
    keep_checkpoints: int = 2
    reset_at_iteration: bool = False
    evaluate_in_place: bool = False

    def __post_init__(self) -> None:
        positive = ("n_train_itr", "n_steps", "eval_episodes", "save_freq", "keep_checkpoints")
        ranges = dict.fromkeys(positive, "[1, inf)") | dict.fromkeys(("val_freq", "save_model_freq"), "[0, inf)")
        require_ranges(self, "train", ranges)


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the last good checkpoint."""


class Trainer:
    """Row 0 of the log is the evaluation of the policy that training starts from; row i follows the i-th update."""

    def __init__(
        self,
        algorithm: Algorithm,
        config: TrainConfig,
        run: Path,
        generator: torch.Generator,
        collector: Collector | None = None,
        evaluator: Evaluator | None = None,
        interface: Callable[[], Mapping[str, Any]] = dict,
        run_config: Mapping[str, Any] | None = None,
        introduction: str = "",
    ) -> None:
        """``generator`` is the source of all randomness in the algorithm; ``interface`` gives what else a checkpoint
        should hold for those who only use the policy; ``introduction`` is printed before training.
        """
        self.algorithm = algorithm
        self.config = config
        self.run = run
        self.generator = generator
        self.collector = collector
        self.evaluator = evaluator
        self.interface = interface
        self.run_config = run_config or {}
        self.introduction = introduction
        self.journal = None if algorithm.replay is None else Journal(run / "replay", algorithm.replay)
        self.iteration = 0
        self.started = False
        self.env_steps = 0
        cuda = generator.device.type == "cuda"
        self.timer = PhaseTimer(torch.cuda.synchronize if cuda else None)

    @property
    def next_row(self) -> int:
        """The ``iteration`` of the log's next row."""
        return self.iteration + 1 if self.started else 0

    def train(self, log: RunLog) -> dict[str, float]:
        """Run the remaining iterations; returns the last row."""
        row: dict[str, float] = {}
        if self.introduction:
            print(self.introduction)
        if not self.started:
            row = self._start(log)
        while self.iteration < self.config.n_train_itr:
            row = self._iterate(log)
        return row

    def _start(self, log: RunLog) -> dict[str, float]:
        if self.collector is not None:
            self.collector.reset()
        row: dict[str, float] = {"iteration": 0, "env_steps": 0}
        if self.evaluator is not None:
            with log.phase("evaluate"), self.timer("evaluate"):
                row |= _prefixed("eval", self.evaluator.evaluate(self.algorithm.actor))
        if self.collector is None:
            del row["env_steps"]
        log.iteration(row | self.timer.lap())
        self.save()
        self.started = True
        return row

    def _iterate(self, log: RunLog) -> dict[str, float]:
        config, i = self.config, self.iteration
        in_place = config.evaluate_in_place and config.val_freq > 0 and i % config.val_freq == 0
        row: dict[str, float] = {"iteration": i + 1}
        if self.algorithm.steps_to_collect(i):
            with log.phase("collect"), self.timer("collect"):
                statistics = self._collect(deterministic=in_place)
            row |= _prefixed("eval" if in_place else "train", statistics)
            row["env_steps"] = self.env_steps
        if not in_place:
            with log.phase("update"), self.timer("update"):
                row |= _read(self.algorithm.update(i))
            self._require_finite(row)
            if row.get("ppo/first_clip_fraction", 0) > HEALTHY_CLIP_FRACTION:
                log.warn(
                    f"iteration {i + 1}: {row['ppo/first_clip_fraction']:.1%} of the first minibatch is clipped before "
                    "any step, so sampling and update compute different log-probs; try precision=fp32"
                )
        self.algorithm.step_schedules(i)
        self.iteration += 1
        last = self.iteration == config.n_train_itr
        if self.evaluator is not None and config.val_freq and (self.iteration % config.val_freq == 0 or last):
            with log.phase("evaluate"), self.timer("evaluate"):
                row |= _prefixed("eval", self.evaluator.evaluate(self.algorithm.actor))
        log.iteration(row | self.timer.lap())
        if self.iteration % config.save_freq == 0 or last:
            with log.phase("save"), self.timer("save"):
                self.save()
        return row

    def _collect(self, deterministic: bool) -> dict[str, float]:
        collector, buffer = self.collector, self.algorithm.buffer
        assert collector is not None
        assert buffer is not None
        if self.config.reset_at_iteration or deterministic:
            collector.reset()
        statistics = collector.collect(buffer, deterministic)
        if not deterministic:
            self.env_steps += buffer.num_steps * collector.env.num_envs * collector.env.act_steps
        statistics["nan_count"] = float(getattr(collector.env, "nan_count", 0))
        return statistics

    def _require_finite(self, row: Mapping[str, float]) -> None:
        bad = sorted(key for key, value in row.items() if key.startswith("loss/") and not math.isfinite(value))
        for name, module in self.algorithm.modules().items():
            finite = [p.isfinite().all() for p in module.parameters() if p.requires_grad]
            if finite and not torch.stack(finite).all():
                bad.append(f"a weight of {name}")
        if bad:
            good = checkpoints(self.run)
            raise TrainingDiverged(
                f"iteration {self.iteration + 1}: {', '.join(bad)} is not finite; "
                f"the last good checkpoint is {good[-1] if good else 'not there'}"
            )

    def save(self) -> Path:
        """Write the checkpoint from which the next iteration starts."""
        path = checkpoint_path(self.run, self.iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "env_steps": self.env_steps,
            "generator": self.generator.get_state(),
            "noise": vars(self.algorithm.actor.noise),
            "algorithm": self.algorithm.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
            "interface": self.interface(),
            "replay": [] if self.journal is None else self.journal.save(self.iteration),
        }
        weights = {name: module.state_dict() for name, module in self.algorithm.modules().items()}
        Checkpoint(weights, state, self.run_config, self.iteration, self.algorithm.deployed).save(path)
        oldest = prune(self.run, self.config.keep_checkpoints, self.config.save_model_freq)
        if self.journal is not None:
            self.journal.prune(oldest)
        return path

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        checkpoint = Checkpoint.load(path)
        for name, module in self.algorithm.modules().items():
            load_weights(module, checkpoint.weights.get(name, {}), f"{path} ({name})")
        state = checkpoint.state
        self.iteration, self.started = checkpoint.iteration, True
        try:
            self.env_steps = int(state["env_steps"])
            self.generator.set_state(state["generator"])
            self.algorithm.actor.noise = NoiseStream(**state["noise"])
            if self.collector is not None:
                self.collector.load_state_dict(state["collector"])
            self.algorithm.load_state_dict(state["algorithm"])
            if self.journal is not None:
                self.journal.load(state["replay"])
        except KeyError as error:
            raise CheckpointError(f"{path}: holds no state of {error}; resume with the run's own settings") from error


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _read(metrics: Metrics) -> dict[str, float]:
    """All metrics as floats, with one wait for the device."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, Tensor)}
    if tensors:
        values = torch.stack([value.double() for value in tensors.values()]).tolist()
        numbers |= dict(zip(tensors, values, strict=True))
    return numbers
