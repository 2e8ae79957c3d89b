"""How many env steps a second do the environments make? Ours, and gymnasium's AsyncVectorEnv with the same task.

    python -m benchmarks.environments --out benchmarks/results/environments.csv
    python -m benchmarks.environments Hopper-v4 --num-envs 40

Both execute random actions, ours in chunks of 4 with everything that `ChunkEnv` does. A step's CPU time, of worker
processes too, is what a busy machine leaves comparable; wall-clock time is what a run waits.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import environment, write_csv
from dppo_fast.cli import guarded
from dppo_fast.envs import EnvConfig, make_env
from dppo_fast.envs.robomimic import TASKS as ROBOMIMIC_TASKS

ACT_STEPS = 4
WARM_UP = 4


@dataclass(frozen=True)
class Task:
    """``options`` of ours, and gymnasium's id of the same task with its arguments, or the class that it is made of;
    ``package`` registers it.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    gymnasium: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str = "gymnasium"


ROBOTICS = "gymnasium_robotics"
TASKS = {
    "Hopper-v4": Task(gymnasium="Hopper-v4"),
    "HalfCheetah-v4": Task(gymnasium="HalfCheetah-v4"),
    "kitchen-mixed-v0": Task(gymnasium="FrankaKitchen-v1", package=ROBOTICS),
    "MetaWorld/Reach-v3": Task(
        {"partially_observable": False}, "Meta-World/MT1", {"env_name": "reach-v3"}, package="metaworld"
    ),
    "AdroitHandDoor-v1": Task(gymnasium="AdroitHandDoor-v1", package=ROBOTICS),
    "FetchReach-v4": Task(gymnasium="FetchReach-v4", package=ROBOTICS),
    **{
        name: Task(
            gymnasium="dppo_fast.envs.robosuite:RobosuiteEnv",
            arguments={"name": robosuite, "arms": arms, "low_dim_keys": ["object"]},
            package="robosuite",
        )
        for name, (robosuite, arms) in ROBOMIMIC_TASKS.items()
    },
}


def measure(step: Callable[[], object], steps: int, env_steps: int, workers: Sequence[int] = ()) -> dict[str, float]:
    """``env_steps`` per second of ``steps`` calls: of wall-clock time, and of CPU time, the ``workers``' included."""
    for _ in range(WARM_UP):
        step()
    wall, cpu = time.perf_counter(), _cpu_seconds(workers)
    for _ in range(steps):
        step()
    return {"wall": env_steps / (time.perf_counter() - wall), "cpu": env_steps / (_cpu_seconds(workers) - cpu)}


def _cpu_seconds(workers: Sequence[int]) -> float:
    """Of this process and ``workers``."""
    ticks = 0
    for worker in workers:
        user, system = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def ours(name: str, task: Task, num_envs: int, steps: int) -> dict[str, float]:
    config = EnvConfig(name, num_envs, ACT_STEPS, options=dict(task.options))
    env = make_env(config, "cpu", 0)
    env.reset()
    shape = (num_envs, ACT_STEPS, env.action_dim)
    workers = [process.pid or 0 for process in multiprocessing.active_children()]
    result = measure(lambda: env.step(torch.rand(shape) * 2 - 1), steps // ACT_STEPS, num_envs * steps, workers)
    env.close()
    return result


def theirs(task: Task, num_envs: int, steps: int) -> dict[str, float] | None:
    """None where the package is not installed."""
    import gymnasium

    try:
        importlib.import_module(task.package)
    except ImportError:
        return None
    spec: Any = task.gymnasium
    if ":" in spec:
        spec = gymnasium.envs.registration.EnvSpec("Benchmark-v0", spec)
    env: Any = gymnasium.make_vec(spec, num_envs, vectorization_mode="async", **task.arguments)
    env.reset(seed=0)
    workers = [process.pid for process in env.processes]
    result = measure(lambda: env.step(env.action_space.sample()), steps, num_envs * steps, workers)
    env.close()
    return result


def row(name: str, num_envs: int, steps: int) -> dict[str, Any]:
    task = TASKS.get(name, Task())
    result: dict[str, Any] = {"task": name, "num_envs": num_envs, "steps": steps}
    result |= {f"ours_{clock}": round(value) for clock, value in ours(name, task, num_envs, steps).items()}
    other = theirs(task, num_envs, steps) if task.gymnasium else None
    for clock in ("wall", "cpu"):
        result[f"async_{clock}"] = round(other[clock]) if other else ""
        result[f"ratio_{clock}"] = round(result[f"ours_{clock}"] / other[clock], 1) if other else ""
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="env.id of each; default: all of the table")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="of every environment")
    parser.add_argument("--out", type=Path, help="a CSV file")
    options = parser.parse_args(arguments)

    def run() -> None:
        rows = (row(name, options.num_envs, options.steps) for name in options.tasks or TASKS)
        write_csv(rows, environment(torch.device("cpu")), options.out)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
