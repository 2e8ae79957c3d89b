"""The loop that every algorithm runs in: collect, update, evaluate, save, log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from dppo_fast.types import Metrics, NoiseStream, UserError, require_ranges

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
        """``generator`` is the source of all randomness in the algorithm but for dropout, which takes PyTorch's default
        one; ``interface`` gives what else a checkpoint should hold for those who only use the policy; ``introduction``
        is printed before training.
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
        self.saved = -1
        self.env_steps = 0
        cuda = generator.device.type == "cuda"
        self.dropout = torch.cuda.default_generators[generator.device.index or 0] if cuda else torch.default_generator
        self.timer = PhaseTimer(torch.cuda.synchronize if cuda else None)

    @property
    def next_row(self) -> int:
        """The ``iteration`` of the log's next row."""
        return self.iteration + 1 if self.started else 0

    def train(self, log: RunLog, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Run the remaining iterations, or, saved, until ``stop()``, which is asked after each; returns the last row.

        Raises TrainingDiverged, and UserError where the run directory cannot be written.
        """
        row: dict[str, float] = {}
        if self.introduction:
            print(self.introduction)
        if not self.started:
            row = self._start(log)
        while self.iteration < self.config.n_train_itr and not stop():
            row = self._iterate(log)
        if self.saved != self.iteration:
            self.save()
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
        self._log(log, row)
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
                row |= self._update(i)
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
        self._log(log, row)
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
        for name in ("nan_count", "worker_deaths"):
            statistics[name] = float(getattr(collector.env, name, 0))
        return statistics

    def _update(self, iteration: int) -> dict[str, float]:
        """The update's metrics. Raises TrainingDiverged where a loss or what was trained is not finite; both are read
        at once.
        """
        metrics = self.algorithm.update(iteration)
        for name, module in self.algorithm.modules().items():
            if finite := [p.isfinite().all() for p in module.parameters() if p.requires_grad]:
                metrics[f"finite/{name}"] = torch.stack(finite).all()
        row = _read(metrics)
        bad = sorted(key for key, value in row.items() if key.startswith("loss/") and not math.isfinite(value))
        for key in [key for key in row if key.startswith("finite/")]:
            if not row.pop(key):
                bad.append(f"a weight of {key.removeprefix('finite/')}")
        if bad:
            good = checkpoints(self.run)
            raise TrainingDiverged(
                f"iteration {iteration + 1}: {', '.join(bad)} is not finite; "
                f"the last good checkpoint is {good[-1] if good else 'not there'}"
            )
        return row

    def _log(self, log: RunLog, row: Mapping[str, float]) -> None:
        with self._writing():
            log.iteration({**row, **self.timer.lap()})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what to do where the disk is full or may not be written."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.run}: cannot be written ({error.strerror}); what was saved before is whole: "
                f"make room or give access, then resume={self.run} continues the run"
            ) from error

    def save(self) -> Path:
        """Write the checkpoint from which the next iteration starts. Raises UserError where that fails."""
        with self._writing():
            path = self._save()
        self.saved = self.iteration
        return path

    def _save(self) -> Path:
        path = checkpoint_path(self.run, self.iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "env_steps": self.env_steps,
            "generator": self.generator.get_state(),
            "dropout": self.dropout.get_state(),
            "noise": vars(self.algorithm.actor.noise),
            "algorithm": self.algorithm.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
            "interface": self.interface(),
            "replay": [] if self.journal is None else self.journal.save(self.iteration),
        }
        weights = {name: module.state_dict() for name, module in self.algorithm.modules().items()}
        Checkpoint(weights, state, self.run_config, self.iteration, self.algorithm.deployed).save(path)
        kept = prune(self.run, self.iteration, self.config.keep_checkpoints, self.config.save_model_freq)
        if self.journal is not None:
            self.journal.prune(kept)
        return path

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        checkpoint = Checkpoint.load(path)
        for name, module in self.algorithm.modules().items():
            load_weights(module, checkpoint.weights.get(name, {}), f"{path} ({name})")
        state = checkpoint.state
        self.iteration, self.started = checkpoint.iteration, True
        self.saved = self.iteration
        try:
            self.env_steps = int(state["env_steps"])
            self.generator.set_state(state["generator"])
            self.dropout.set_state(state["dropout"])
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
