"""What a run is going to be like, found out on a few decisions and one minibatch of each kind."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from dppo_fast.algorithms.bc import BehaviourCloning
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.rollout import Collector
from dppo_fast.runtime.graph import WARM_UPS
from dppo_fast.runtime.memory import readable
from dppo_fast.trainer import Trainer

DECISIONS = 5
CALLS = 3


class Rehearsed:
    """Stands for ``learn``, which is called once per minibatch: a few calls of each kind are real, and the quickest of
    these counts; the others give what the last of these gave.
    """

    def __init__(self, learn: Callable[..., Any], clock: Callable[[], float], kind: int) -> None:
        """``kind`` is the place of the argument that tells minibatches apart which cost differently."""
        self.learn, self.clock, self.kind = learn, clock, kind
        self.enabled = getattr(learn, "enabled", False)
        self.limit = WARM_UPS + 2 if self.enabled else CALLS
        self.seconds: dict[Any, float] = {}
        self.results: dict[Any, Any] = {}
        self.calls: Counter[Any] = Counter()
        self.real = 0.0

    def __call__(self, *arguments: Any) -> Any:
        kind = arguments[self.kind]
        self.calls[kind] += 1
        if self.calls[kind] <= self.limit:
            start = self.clock()
            self.results[kind] = self.learn(*arguments)
            seconds = self.clock() - start
            self.real += seconds
            self.seconds[kind] = min(seconds, self.seconds.get(kind, seconds))
        return self.results[kind]

    def total(self) -> float:
        """Seconds that all calls would have taken."""
        return sum(self.seconds[kind] * count for kind, count in self.calls.items())


def rehearse(trainer: Trainer) -> str:
    """Lines of sizes, memory and expected times; nothing is written. The trainer is of no use afterwards.

    The times are those of the last iteration, when explorations and warm-ups are over.
    """
    algorithm, collector, last = trainer.algorithm, trainer.collector, trainer.config.n_train_itr - 1
    device = trainer.generator.device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    lines: dict[str, str] = {}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in algorithm.modules().items()}
    seconds = 0.0
    if collector is not None:
        env = collector.env
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in env.obs_shapes.items())
        lines["environments"] = f"{env.num_envs}, observations {shapes}, {env.action_dim} action dims"
    lines["weights"] = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    lines["memory"] = trainer.introduction.removeprefix("memory: ")
    decisions = algorithm.steps_to_collect(last)
    if collector is not None and algorithm.buffer is not None and decisions:
        each = _fill(collector, algorithm.buffer, clock)
        lines["collecting"] = f"{decisions} decisions of all environments, {each * 1e3:.3g} ms each"
        seconds = each * decisions
    name, kind = ("minibatch", 2) if isinstance(algorithm, BehaviourCloning) else ("learn", 1)
    learn = Rehearsed(getattr(algorithm, name), clock, kind)
    setattr(algorithm, name, learn)
    start = clock()
    algorithm.update(last)
    update = clock() - start - learn.real + learn.total()
    seconds += update
    count = learn.calls.total()
    lines["update"] = f"{count:,} minibatches" + (f", {learn.total() / count * 1e3:.3g} ms each" if count else "")
    lines["in use"] = _in_use(device)
    lines["an iteration"] = f"{_duration(seconds)}, evaluation not included"
    lines["the run"] = f"{_duration(seconds * (last + 1))} for {last + 1:,} iterations"
    return "\n".join(f"{name + ':':14}{text}" for name, text in lines.items())


def _fill(collector: Collector, buffer: RolloutBuffer, clock: Callable[[], float]) -> float:
    """Seconds of one decision; the buffer is full afterwards, and every episode in it ends."""
    env, actor = collector.env, collector.actor
    collector.reset()
    obs, first, seconds = collector.obs, collector.first, []
    assert first is not None
    buffer.clear()
    for _ in range(min(DECISIONS + 1, buffer.num_steps)):
        start = clock()
        act = actor.act(obs)
        buffer.add(obs, act.record, first)
        step = env.step(act.action[:, : env.act_steps])
        buffer.complete(step)
        obs, first = step.obs, step.terminated | step.truncated
        seconds.append(clock() - start)
    while buffer.t < buffer.num_steps:
        buffer.add(obs, act.record, first)
        buffer.complete(step)
    buffer.terminated[-1], buffer.truncated[-1] = True, False
    return median(seconds[1:] or seconds)


def _in_use(device: torch.device) -> str:
    kilo = 1 if sys.platform == "darwin" else 1024
    host = f"{readable(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo)} of the host's memory"
    if device.type != "cuda":
        return host
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return f"{host}, {readable(peak)} of the device's {readable(total)}, of which {readable(free)} are free"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
